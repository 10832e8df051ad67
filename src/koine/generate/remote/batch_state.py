"""State that the calls of one `generate` share: money held back, waiting, and stopping after a failure."""

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
"""Prompt and completion tokens; or that nothing can have been charged; or that this is not known."""


class StoppedError(Exception):
    """Another call has failed; this one is not begun, or not repeated."""


@dataclass
class BatchState:
    """State of the calls of one `generate`, all inside one event loop.

    settled: set whenever a call no longer holds money back.
    stopped: set when a call has failed for good: no other is begun, those under way are let finish.
    notes: what was odd about answers, and how often.
    disk: what kept an answer from the cache, or its price from the ledger.
    """

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    reserved_calls: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, UserError]] = field(default_factory=list)
    disk: UserError | None = None

    async def reserve_cost(self, call: Call, ledger: Ledger | None, url: str) -> None:
        """Hold the call's worst case back.

        Where that would pass the ceiling, calls under way are waited for: they may cost less.

        Raises `UserError` where none is under way, and `StoppedError` where another call has failed.
        """
        if self.stopped.is_set():
            raise StoppedError
        if ledger is None:
            return
        while not ledger.reserve(call.cost):
            if self.reserved_calls == 0:
                now = ledger.spending()
                raise UserError(
                    f"{call.name}: it may cost {call.cost:f}, and with {now.at_most:f} spent that would pass the ceiling "
                    f"of {ledger.budget.ceiling:f}",
                    where=url,
                    hint="raise the ceiling, shorten the answers, or ask less",
                )
            self.settled.clear()
            await self.wait_or_stop(self.settled.wait())
        self.reserved_calls += 1

    def settle(self, call: Call, charged: Charge, ledger: Ledger | None) -> None:
        """Enter in the ledger what the call has cost, and wake those that wait for money."""
        if ledger is None:
            return
        try:
            if charged == "nothing":
                ledger.release(call.cost)
            elif charged != "unknown":
                ledger.settle(call.cost, prompt_tokens=charged[0], completion_tokens=charged[1])
        except UserError as error:
            # The call stays in the ledger at its worst; its answer is not thrown away for it.
            self.disk = error
            self.stopped.set()
        self.reserved_calls -= 1
        self.settled.set()

    async def wait_or_stop(self, waited: Awaitable[Any]) -> None:
        """Wait for `waited`, but no longer than the run goes on (`StoppedError`)."""
        tasks = [asyncio.ensure_future(waited), asyncio.ensure_future(self.stopped.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if self.stopped.is_set():
                raise StoppedError
        finally:
            for task in tasks:
                task.cancel()
