"""State that the calls of one `generate` share: reserved costs, stopping after a failure, warnings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, Literal

from koine.errors import UserError
from koine.generate.remote.budget import Ledger
from koine.generate.remote.requests import Call

Charge = tuple[int, int] | Literal["nothing", "unknown"]
"""Prompt and completion tokens that a call is charged for; "nothing" where it cannot have been charged."""


class StoppedError(Exception):
    """Another call has failed: this one is not started, or not repeated."""


@dataclass
class BatchState:
    """State of the calls of one `generate`, all in one event loop.

    settled: set whenever a call's reserved cost is settled.
    stopped: set when a call has failed for good: no other starts, those in flight may finish.
    reserved_calls: calls whose cost is reserved in the ledger.
    notes: what the user is warned about, and how often.
    failures: errors, with the number of the conversation.
    disk_error: why a completion or a price could not be written.
    """

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reserved_calls: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, UserError]] = field(default_factory=list)
    disk_error: UserError | None = None

    async def reserve_cost(self, call: Call, ledger: Ledger | None, url: str) -> None:
        """Reserve the call's worst case in the ledger.

        Where that would pass the ceiling, wait for calls in flight, which may cost less.
        Raises `UserError` where none is in flight, and `StoppedError` where another call has failed.
        """
        if self.stopped.is_set():
            raise StoppedError
        if ledger is None:
            return
        while not ledger.reserve(call.cost):
            if self.reserved_calls == 0:
                now = ledger.spending()
                raise UserError(
                    f"{call.name}: it may cost {call.cost:f}, and with {now.at_most:f} spent that would pass "
                    f"the ceiling of {ledger.budget.ceiling:f}",
                    where=url,
                    hint="raise the ceiling, shorten the answers, or ask less",
                )
            self.settled.clear()
            await self.wait_or_stop(self.settled.wait())
        self.reserved_calls += 1

    def settle(self, call: Call, charge: Charge, ledger: Ledger | None) -> None:
        """Enter the call's cost in the ledger, and wake calls that wait for the budget."""
        if ledger is None:
            return
        try:
            if charge == "nothing":
                ledger.release(call.cost)
            elif charge != "unknown":
                ledger.settle(call.cost, prompt_tokens=charge[0], completion_tokens=charge[1])
        except UserError as error:
            # The call stays in the ledger at its worst case; its completion is still used.
            self.disk_error = error
            self.stopped.set()
        self.reserved_calls -= 1
        self.settled.set()

    async def wait_or_stop(self, awaited: Awaitable[Any]) -> None:
        """Wait for `awaited`. Raises `StoppedError` as soon as another call fails."""
        tasks = [asyncio.ensure_future(awaited), asyncio.ensure_future(self.stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self.stopped.is_set():
                raise StoppedError
        finally:
            for task in tasks:
                task.cancel()
