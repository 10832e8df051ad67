"""Typed fields of configurations: numbers with bounds, choices, JSON objects.

A value that does not fit is a `UserError` of one line. Nothing is converted: a bool is no number, a string is
no bool, and NaN is no number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args, get_type_hints

from koine.errors import UserError, did_you_mean

MAX_INTEGER = 2**53
"""Largest integer where no other bound is given: float64 holds all integers up to it."""
_SHOWN = 60
_REQUIRED: Any = object()


def short_repr(value: Any) -> str:
    """Return a value as a message shows it: at most 60 characters, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of {int(value.bit_length() * math.log10(2)) + 1} digits"
    if isinstance(value, str):
        value = value[: 2 * _SHOWN]
    if isinstance(value, list | tuple | dict | set) and len(value) > _SHOWN:
        return f"a {type(value).__name__} of {len(value)} entries"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _wrong(name: str, value: Any, must: str, where: str | Path | None) -> UserError:
    return UserError(f"{name} is {short_repr(value)}", where=where, hint=f"it must be {must}")


def _check_bounds(
    name: str,
    value: float,
    low: float | None,
    high: float | None,
    above: float | None,
    where: str | Path | None,
) -> None:
    if low is not None and not value >= low:
        raise _wrong(name, value, f"at least {low:g}" if isinstance(low, float) else f"at least {low}", where)
    if above is not None and not value > above:
        raise _wrong(name, value, f"greater than {above:g}", where)
    if high is not None and not value <= high:
        raise _wrong(
            name, value, f"at most {high:g}" if isinstance(high, float) else f"at most {high}", where
        )


def check_integer(
    name: str,
    value: Any,
    *,
    low: int | None = None,
    high: int = MAX_INTEGER,
    where: str | Path | None = None,
) -> int:
    """Return an integer within its bounds; raise `UserError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "an integer", where)
    _check_bounds(name, value, low, high, None, where)
    return value


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    where: str | Path | None = None,
) -> float:
    """Return a finite number within its bounds as a float; raise `UserError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(name, value, "a number", where)
    if isinstance(value, float) and math.isnan(value):
        raise _wrong(name, value, "a number", where)
    _check_bounds(name, value, low, high, above, where)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise _wrong(name, value, "finite", where)
    return number


def check_boolean(name: str, value: Any, *, where: str | Path | None = None) -> bool:
    """Return a bool; raise `UserError` for anything else."""
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false", where)
    return value


def check_text(name: str, value: Any, *, where: str | Path | None = None) -> str:
    """Return a string; raise `UserError` for anything else."""
    if not isinstance(value, str):
        raise _wrong(name, value, "a string", where)
    return value


def check_choice(name: str, value: Any, choices: Collection[str], *, where: str | Path | None = None) -> str:
    """Return one of `choices`; raise `UserError` with the nearest of them for anything else."""
    if not isinstance(value, str):
        raise _wrong(name, value, f"one of {', '.join(choices)}", where)
    if value not in choices:
        raise UserError(
            f"{name} is {short_repr(value)}", where=where, hint=did_you_mean(value[:_SHOWN], choices)
        )
    return value


def check_file_name(name: str, value: Any, *, where: str | Path | None = None) -> str:
    """Return the name of a file in the same folder; raise `UserError` for a path or anything else."""
    if (
        not isinstance(value, str)
        or value in ("", ".", "..")
        or any(character in value for character in "/\\\0")
        or len(value.encode("utf-8", "surrogatepass")) > 255
    ):
        raise _wrong(name, value, "the name of a file in the same folder", where)
    return value


class Fields:
    """The fields of a JSON object. `null` is the same as left out, as in `transformers`.

    Each method returns the field, or its default where it is left out. It raises `UserError` where the field
    has another type or is out of its bounds, and where it has neither value nor default.

    Args:
        value: The object.
        where: The file, for error messages.
        hint_if_broken: How to fix a file that lacks a field or is no object.
    """

    def __init__(
        self, value: Any, where: str | Path, *, hint_if_broken: str = "the file is damaged; write it again"
    ) -> None:
        if not isinstance(value, dict):
            raise UserError("is not a JSON object", where=where, hint=hint_if_broken)
        self.value: dict[str, Any] = value
        self.where = where
        self.names_read: set[str] = set()
        """The names that were asked for."""
        self.hint_if_broken = hint_if_broken

    def wrong(self, name: str, must: str) -> UserError:
        """Return the error for a field that is not what it must be."""
        return UserError(
            f"the field '{name}' is {short_repr(self.value.get(name))}",
            where=self.where,
            hint=f"it must be {must}",
        )

    def check_known(self, names: Collection[str]) -> None:
        """Raise `UserError` for a key that is none of `names`, with the nearest of them."""
        for key in self.value:
            if key not in names:
                raise UserError(
                    f"unknown key '{key}'", where=self.where, hint=did_you_mean(key[:_SHOWN], names)
                )

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the field, of whatever type."""
        self.names_read.add(name)
        got = self.value.get(name)
        if got is not None:
            return got
        if default is _REQUIRED:
            raise UserError(f"the field '{name}' is missing", where=self.where, hint=self.hint_if_broken)
        return default

    def integer(
        self, name: str, default: Any = _REQUIRED, *, low: int | None = None, high: int = MAX_INTEGER
    ) -> Any:
        """Return an integer."""
        got = self.get(name, default)
        return (
            got if got is None else check_integer(self._name(name), got, low=low, high=high, where=self.where)
        )

    def number(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        low: float | None = None,
        high: float | None = None,
        above: float | None = None,
    ) -> Any:
        """Return a number, as a float."""
        got = self.get(name, default)
        if got is None:
            return None
        return check_number(self._name(name), got, low=low, high=high, above=above, where=self.where)

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a bool."""
        got = self.get(name, default)
        return got if got is None else check_boolean(self._name(name), got, where=self.where)

    def text(self, name: str, default: Any = _REQUIRED, *, choices: Collection[str] | None = None) -> Any:
        """Return a string; one of `choices` where they are given."""
        got = self.get(name, default)
        if got is None:
            return None
        if choices is not None:
            return check_choice(self._name(name), got, choices, where=self.where)
        return check_text(self._name(name), got, where=self.where)

    def entries(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return a list."""
        got = self.get(name, default)
        if got is not None and not isinstance(got, list):
            raise self.wrong(name, "a list")
        return got

    def inner(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the fields of an object inside this one."""
        got = self.get(name, default)
        if got is None:
            return None
        if not isinstance(got, dict):
            raise self.wrong(name, "an object")
        return Fields(got, self.where, hint_if_broken=self.hint_if_broken)

    @staticmethod
    def _name(name: str) -> str:
        return f"the field '{name}'"


def checked_field(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    **metadata: Any,
) -> Any:
    """Return a dataclass field with its help text and its bounds, which `check_dataclass` reads.

    Args:
        default: its default.
        help: what it means, for the command line.
        low: smallest value.
        high: largest value.
        above: bound that the value must be greater than.
        metadata: more of the field's metadata.
    """
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "above": above, **metadata}
    )


def check_dataclass(value: Any) -> None:
    """Check every field of a dataclass by its type and its bounds; integers become floats where they must.

    Types are `int`, `float`, `bool`, `str` and `Literal` of strings. Raises `UserError` for the first field
    that does not fit. Call it in `__post_init__`.
    """
    types = get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, given, expected = field.name, getattr(value, field.name), types[field.name]
        low, high, above = (field.metadata.get(bound) for bound in ("low", "high", "above"))
        if get_args(expected):
            check_choice(name, given, get_args(expected))
        elif expected is int:
            check_integer(name, given, low=low, high=MAX_INTEGER if high is None else high)
        elif expected is float:
            number = check_number(name, given, low=low, high=high, above=above)
            object.__setattr__(value, name, number)
        elif expected is bool:
            check_boolean(name, given)
        else:
            check_text(name, given)
