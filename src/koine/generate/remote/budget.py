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
MOST = Decimal(10) ** 15
"""No amount of money and no count of tokens is larger."""

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
            self._write(now, unsettled=_less(now.unsettled, worst))

    def settle(self, worst: Decimal, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace what was reserved for a call by the price of its tokens."""
        with self._changing() as now:
            self._write(
                now,
                unsettled=_less(now.unsettled, worst),
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
            lock = self._folder / LOCK
            with disk_errors(lock), exclusive(lock, doing="writing the ledger", wait=-1):
                yield self._read()

    def _read(self) -> Spending:
        if self._folder is None:
            return self._memory
        path = self._folder / LEDGER
        if not path.exists():
            return Spending()
        # Never begun anew by itself: that would forget money that was spent.
        hint = "the ledger is damaged; correct it, or remove it to count from nothing (answers in the cache stay)"
        try:
            return _parse(read_json(path))
        except UserError as error:
            raise UserError(error.what, where=path, hint=hint) from None
        except _OtherVersionError as error:
            raise UserError(
                f"a ledger of version {error}, and this Koine reads version {VERSION}",
                where=path,
                hint="use the Koine that wrote it, or another cache folder; where the ledger is damaged, correct it",
            ) from None
        except OSError as error:
            raise UserError(f"cannot be read ({error.strerror})", where=path, hint=hint) from None
        except (KeyError, TypeError, ValueError, InvalidOperation, RecursionError) as error:
            raise UserError(f"not a ledger ({_reason(error)})", where=path, hint=hint) from None

    def _write(self, before: Spending, **changed: Any) -> None:
        after = Spending(**{**vars(before), **changed})
        self._memory = after
        if self._folder is not None:
            values = {
                name: format(value, "f") if isinstance(value, Decimal) else value
                for name, value in vars(after).items()
            }
            write_json(self._folder / LEDGER, {"version": VERSION, **values})


class _OtherVersionError(Exception):
    """A ledger of a later Koine."""


def _parse(value: Any) -> Spending:
    version = value["version"]
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise _OtherVersionError(version)
    if version != VERSION:
        raise ValueError("no version")
    counts = {name: value[name] for name in ("calls", "prompt_tokens", "completion_tokens")}
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
            raise ValueError(f"{name} is no count")
    return Spending(
        spent=_stored_amount("spent", value["spent"]),
        unsettled=_stored_amount("unsettled", value["unsettled"]),
        **counts,
    )


def _stored_amount(name: str, text: Any) -> Decimal:
    amount = Decimal(text) if isinstance(text, str) else Decimal("nan")
    if not (amount.is_finite() and 0 <= amount <= MOST):
        raise ValueError(f"{name} is no amount in quotes")
    return amount


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return str(error) if type(error) is ValueError else type(error).__name__


def _less(unsettled: Decimal, worst: Decimal) -> Decimal:
    """A ledger that was corrected by hand meanwhile may hold less than is given back."""
    return max(Decimal(0), unsettled - worst)


def _amount(name: str, value: Money) -> Decimal:
    try:
        amount = Decimal(str(value))
    except (InvalidOperation, ValueError):
        raise UserError(f"{name} is '{value!s:.40}'", hint="give an amount of money such as 2.50") from None
    if not (amount.is_finite() and 0 <= amount <= MOST):
        raise UserError(f"{name} is {value!s:.40}", hint="give an amount of money of 0 or more")
    if amount and amount.adjusted() < -30:
        raise UserError(f"{name} is {value!s:.40}", hint="give an amount of money such as 2.50")
    return amount
