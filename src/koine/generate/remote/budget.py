"""Budget of calls to a paid endpoint: prices, a ceiling, and a ledger on disk."""

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
TOKENS_PER_PRICE = 1_000_000
MAX_AMOUNT = Decimal(10) ** 15
"""Largest amount of money, and largest token count."""

Money = float | str | Decimal


@dataclass(frozen=True)
class Budget:
    """Prices for a million tokens and the ceiling of all calls, in any one currency."""

    prompt_price: Decimal
    completion_price: Decimal
    ceiling: Decimal

    def __init__(self, *, prompt_price: Money, completion_price: Money, ceiling: Money) -> None:
        """Raise `UserError` for an invalid amount of money."""
        object.__setattr__(self, "prompt_price", _amount("prompt_price", prompt_price))
        object.__setattr__(self, "completion_price", _amount("completion_price", completion_price))
        object.__setattr__(self, "ceiling", _amount("ceiling", ceiling))

    def cost(self, prompt_tokens: int, completion_tokens: int) -> Decimal:
        """Return the price of a call."""
        return (
            prompt_tokens * self.prompt_price + completion_tokens * self.completion_price
        ) / TOKENS_PER_PRICE


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Totals of a ledger.

    Attributes:
        spent: Price of the tokens that responses reported.
        unsettled: Worst-case cost of calls in flight, and of calls without a response (time-out, dropped
            connection, killed process): the endpoint may have charged for them.
        calls, prompt_tokens, completion_tokens: Of the settled calls.
    """

    spent: Decimal = Decimal(0)
    unsettled: Decimal = Decimal(0)
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def at_most(self) -> Decimal:
        """Most that may have been charged; it counts against the ceiling."""
        return self.spent + self.unsettled


class Ledger:
    """The money spent under one budget, shared by all threads and processes with the same folder.

    A call's worst case is entered as unsettled before it is sent, and replaced by its price afterwards. A
    process that dies in between leaves a ledger that counts too much, never too little.
    """

    def __init__(self, budget: Budget, folder: Path | None) -> None:
        """Read `ledger.json` in `folder`; None counts in memory only.

        Raises `UserError` for a damaged ledger.
        """
        self.budget = budget
        self._folder = folder
        self._memory = Spending()
        self._lock = threading.Lock()
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._read()

    def spending(self) -> Spending:
        """Return the totals of this process and all others."""
        return self._read()

    def reserve(self, worst: Decimal) -> bool:
        """Enter `worst` as unsettled; return False, and enter nothing, where it would pass the ceiling."""
        with self._changing() as now:
            if now.at_most + worst > self.budget.ceiling:
                return False
            self._write(now, unsettled=now.unsettled + worst)
            return True

    def release(self, worst: Decimal) -> None:
        """Release the reservation of a call that cost nothing: it was refused, or never sent."""
        with self._changing() as now:
            self._write(now, unsettled=_less(now.unsettled, worst))

    def settle(self, worst: Decimal, *, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace the reservation of a call by the price of its tokens."""
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
        """Yield the totals while the ledger is locked."""
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
        # Never replaced by an empty one: that would forget spent money.
        hint = "the ledger is damaged; correct it, or remove it to count from 0 (answers in the cache stay)"
        try:
            return _parse(read_json(path))
        except UserError as error:
            raise UserError(error.what, where=path, hint=hint) from None
        except _OtherVersionError as error:
            raise UserError(
                f"a ledger of version {error}, and this Koine reads version {VERSION}",
                where=path,
                hint="use the Koine that wrote it, or another cache folder; where the ledger is damaged, "
                "correct it",
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
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_AMOUNT:
            raise ValueError(f"{name} is no count")
    return Spending(
        spent=_stored_amount("spent", value["spent"]),
        unsettled=_stored_amount("unsettled", value["unsettled"]),
        **counts,
    )


def _stored_amount(name: str, text: Any) -> Decimal:
    amount = Decimal(text) if isinstance(text, str) else Decimal("nan")
    if not (amount.is_finite() and 0 <= amount <= MAX_AMOUNT):
        raise ValueError(f"{name} is no amount in quotes")
    return amount


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return str(error) if type(error) is ValueError else type(error).__name__


def _less(unsettled: Decimal, worst: Decimal) -> Decimal:
    """Subtract, but not below 0: the ledger may have been corrected by hand meanwhile."""
    return max(Decimal(0), unsettled - worst)


def _amount(name: str, value: Money) -> Decimal:
    try:
        amount = Decimal(str(value))
    except (InvalidOperation, ValueError):
        raise UserError(f"{name} is '{value!s:.40}'", hint="give an amount of money such as 2.50") from None
    if not (amount.is_finite() and 0 <= amount <= MAX_AMOUNT):
        raise UserError(f"{name} is {value!s:.40}", hint="give an amount of money of 0 or more")
    if amount and amount.adjusted() < -30:
        raise UserError(f"{name} is {value!s:.40}", hint="give an amount of money such as 2.50")
    return amount
