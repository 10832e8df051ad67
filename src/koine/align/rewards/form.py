"""Rewards for the form and the length of an answer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from koine.align.rewards.reward import Conversation, Record
from koine.align.rewards.text import UNITS, measure
from koine.errors import UserError
from koine.fields import Fields, check_choice, check_number, short_repr

_KEYS = ("pattern", "json", "least", "most", "unit")


@dataclass(frozen=True, kw_only=True)
class Form:
    """Share of the constraints on form that a completion meets: 1 where it meets all.

    pattern: regular expression that the whole completion matches, white space at its ends apart.
    json: the completion is one JSON document.
    least, most: bounds of its length.
    unit: of the bounds: `characters`, `words` or `lines`.

    A record's own field `form`, an object with these keys, replaces the settings that it has.
    """

    pattern: str | None = None
    json: bool = False
    least: float | None = None
    most: float | None = None
    unit: str = "words"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        for name in ("least", "most"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0)
        if self.least is not None and self.most is not None and self.least > self.most:
            raise UserError(
                f"least is {self.least:g}, and most {self.most:g}", hint="least must not exceed most"
            )
        if self.pattern is not None:
            compiled(self.pattern)

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record with another `form` than the keys above, and for no constraint at all."""
        if not self._of(record)._has_constraints():
            raise UserError(
                "the reward `form` has no constraint",
                hint="for example form:json=true, form:pattern='[A-D]', form:most=20, or a field `form` in each record",
            )

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the share of constraints that are met."""
        self.check(record)
        form = self._of(record)
        met = []
        if form.pattern is not None:
            met.append(compiled(form.pattern).fullmatch(completion.strip()) is not None)
        if form.json:
            met.append(is_json(completion))
        if form.least is not None or form.most is not None:
            length = measure(completion, form.unit)
            met.append((form.least or 0) <= length and (form.most is None or length <= form.most))
        return sum(met) / len(met)

    def _has_constraints(self) -> bool:
        return self.json or any(value is not None for value in (self.pattern, self.least, self.most))

    def _of(self, record: Record) -> Form:
        """Return the form that a record asks for."""
        if record.get("form") is None:
            return self
        fields = Fields(record["form"], "the record's form")
        fields.check_known(_KEYS)
        return Form(
            pattern=fields.text("pattern", self.pattern),
            json=fields.boolean("json", self.json),
            least=fields.number("least", self.least),
            most=fields.number("most", self.most),
            unit=fields.text("unit", self.unit, choices=UNITS),
        )


@dataclass(frozen=True, kw_only=True)
class Length:
    """1 for a length within the bounds; below it falls in proportion, above it linearly to 0 at `zero`.

    least, most: bounds of the length.
    zero: length from which the reward is 0; None for twice `most`.
    unit: `characters`, `words` or `lines`.
    """

    most: float
    least: float = 0.0
    zero: float | None = None
    unit: str = "words"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        check_number("most", self.most, above=0.0)
        check_number("least", self.least, low=0.0, high=self.most)
        if self.zero is not None:
            check_number("zero", self.zero, above=self.most)

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return a value from 0 to 1."""
        length = measure(completion, self.unit)
        if length < self.least:
            return length / self.least
        zero = 2 * self.most if self.zero is None else self.zero
        return min(1.0, max(0.0, (zero - length) / (zero - self.most)))


def compiled(pattern: str) -> re.Pattern[str]:
    """Return a regular expression; raise `UserError` where it is none."""
    try:
        return re.compile(pattern, re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"the pattern {short_repr(pattern)} is no regular expression: {error}") from error


def is_json(text: str) -> bool:
    """Return whether a text is one JSON document, without Python's `NaN` and `Infinity`."""
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
