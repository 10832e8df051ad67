"""What calls to a paid endpoint may cost and have cost; the ledger on disk outlives the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import disk_errors, exclusive, read_json, write_json

LEDGER = "ledger.json"
LOCK = "ledger.lock"
VERSION = 1
PER = 1_000_000

Money = float | str | Decimal


@dataclass(frozen=True)
class Budget:
    """Prices for a million tokens, and the ceiling over all calls, in one currency of the user's choice."""

    prompt_price: Decimal
    completion_price: Decimal
    ceiling: Decimal

    def __init__(self, *, prompt_price: Money, completion_price: Money, ceiling: Money) -> None:
        """Raises `UserError` for what is no amount of money."""
        object.__setattr__(self, "prompt_price", _amount("prompt_price", prompt_price))
        object.__setattr__(self, "completion_price", _amount("completion_price", completion_price))
        object.__setattr__(self, "ceiling", _amount("ceiling", ceiling))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """The price of a call."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / PER


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What the ledger holds.

    spent: the price of the tokens that answers reported.
    unsettled: the most that calls cost whose answer never came (a time-out, a dropped connection, a killed process)
        or is under way: the endpoint may have charged for them.
    """

    spent: Decimal = Decimal(0)
    unsettled: Decimal = Decimal(0)
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def at_most(self) -> Decimal:
        """What may have been charged; this is held against the ceiling."""
        return self.spent + self.unsettled


class Ledger:
    """The money spent under one budget, shared by all threads and processes that use the same folder.

    A call's worst case is written down as unsettled before it is sent, and replaced by its true price after. A process
    that dies in between therefore leaves a ledger that counts too much, never too little.
    """

    def __init__(self, budget: Budget, folder: Path | None) -> None:
        """folder: where `ledger.json` lies; None counts in memory only. Raises `UserError` for a damaged ledger."""
        self.budget = budget
        self._folder = folder
        self._memory = Spending()
        self._lock = threading.Lock()
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def spending(self) -> Spending:
        """What has been spent up to now, by this process and others."""
        return self._read()

    def reserve(self, worst: Decimal) -> bool:
        """Write `worst` down as unsettled; False, and nothing written, where it would pass the ceiling."""
        with self._changing() as now:
            if now.at_most + worst > self.budget.ceiling:
                return False
            self._write(now, unsettled=now.unsettled + worst)
            return True

    def release(self, worst: Decimal) -> None:
        """Take back what was reserved for a call that cost nothing: it was refused, or never sent."""
        with self._changing() as now:
            self._write(now, unsettled=now.unsettled - worst)

    def settle(self, worst: Decimal, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was reserved for a call by the price of its tokens."""
        with self._changing() as now:
            self._write(
                now,
                unsettled=now.unsettled - worst,
                spent=now.spent + self.budget.cost(prompt_tokens, completion_tokens),
                calls=now.calls + 1,
                prompt_tokens=now.prompt_tokens + prompt_tokens,
                completion_tokens=now.completion_tokens + completion_tokens,
            )

    @contextmanager
    def _changing(self) -> Iterator[Spending]:
        """What stands in the ledger, with nobody else changing it."""
        with self._lock:
            if self._folder is None:
                yield self._memory
                return
            with exclusive(self._folder / LOCK, doing="writing the ledger", wait=-1):
                yield self._read()

    def _read(self) -> Spending:
        if self._folder is None:
            return self._memory
        path = self._folder / LEDGER
        if not path.exists():
            return Spending()
        # Never begun anew by itself: that would forget money that was spent.
        mend = "the ledger is damaged; correct it, or remove it to count from nothing (answers in the cache stay)"
        try:
            return _parse(read_json(path))
        except UserError as error:
            raise UserError(error.what, where=path, mend=mend) from None
        except (KeyError, TypeError, ValueError, InvalidOperation) as error:
            raise UserError(f"not a ledger ({error!r})", where=path, mend=mend) from None

    def _write(self, before: Spending, **changed: Any) -> None:
        after = Spending(**{**vars(before), **changed})
        self._memory = after
        if self._folder is not None:
            values = {
                name: format(value, "f") if isinstance(value, Decimal) else value
                for name, value in vars(after).items()
            }
            write_json(self._folder / LEDGER, {"version": VERSION, **values})


def _parse(value: Any) -> Spending:
    if value["version"] != VERSION:
        raise ValueError(f"version {value['version']}")
    counts = {name: int(value[name]) for name in ("calls", "prompt_tokens", "completion_tokens")}
    spending = Spending(spent=Decimal(value["spent"]), unsettled=Decimal(value["unsettled"]), **counts)
    if not (spending.spent >= 0 and spending.unsettled >= 0):
        raise ValueError("a negative amount")
    return spending


def _amount(name: str, value: Money) -> Decimal:
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise UserError(f"{name} is '{value}'", mend="give an amount of money such as 2.50") from None
    if not (amount.is_finite() and amount >= 0):
        raise UserError(f"{name} is {value}", mend="give an amount of money of 0 or more")
    return amount
