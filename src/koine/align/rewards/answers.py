"""Rewards for answers that can be checked: given answers, facts of the sample world, numbers."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

from koine.align.rewards.reward import Conversation, Record
from koine.align.rewards.text import bare, contains
from koine.data.sample import QUESTION_LANGUAGES
from koine.data.sample.facts import facts
from koine.data.sample.rendering import sides
from koine.errors import UserError
from koine.fields import check_number, short_repr
from koine.languages import language


@dataclass(frozen=True, kw_only=True)
class Answer:
    """1 for the record's `answer`, else 0. Case, white space and punctuation at the ends do not count.

    contained: value of a longer completion in which the answer stands as words of its own.
    """

    contained: float = 0.0

    def __post_init__(self) -> None:
        check_number("contained", self.contained, low=0.0, high=1.0)

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record without an answer."""
        answer = record.get("answer")
        if not isinstance(answer, str) or not bare(answer):
            raise UserError(
                f"the record's answer is {short_repr(answer)}", hint="add a field `answer` with text"
            )

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return 1, `contained` or 0."""
        self.check(record)
        return graded(completion, record["answer"], self.contained)


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """1 for the right answer to a question of the sample world (`koine.data.sample`), else 0.

    The record's `fact` and `language` say what is right; the answer may be in the record or not.

    contained: value of a longer completion in which the answer stands.
    other_language: value, or its share, where the answer is right in another language of the sample world.
    """

    contained: float = 0.5
    other_language: float = 0.0

    def __post_init__(self) -> None:
        check_number("contained", self.contained, low=0.0, high=1.0)
        check_number("other_language", self.other_language, low=0.0, high=1.0)

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record whose fact or language is not the sample world's."""
        fact, code = record.get("fact"), asked_language(record)
        known = facts()
        kind = str(fact).partition(":")[0]
        if kind not in known or fact not in known[kind]:
            raise UserError(
                f"the record's fact is {short_repr(fact)}, and the sample world has no such fact",
                hint="take records of `koine data sample`, or the reward `answer`",
            )
        if sides(code, cast("str", fact)) is None:
            raise UserError(f"the sample world does not know the fact '{fact}' in '{code}'")

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the best value over the languages."""
        self.check(record)
        asked, best = asked_language(record), 0.0
        for code in (asked, *QUESTION_LANGUAGES) if self.other_language else (asked,):
            found = sides(code, record["fact"])
            if found is not None:
                value = graded(completion, found[1], self.contained)
                best = max(best, value if code == asked else value * self.other_language)
        return best


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """1 where the last number of the completion is the number of the record's `answer`, else 0.

    Digits of any script are read. The record's `language` says which sign separates decimals and which groups.

    tolerance: greatest difference that still counts as equal.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, low=0.0)

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record whose answer has no number."""
        _expected_number(record)

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return 1 or 0; 0 without a number."""
        expected = _expected_number(record)
        code = asked_language(record) if record.get("language") else None
        found = numbers(completion, code)
        return float(bool(found) and abs(found[-1] - expected) <= Decimal(str(self.tolerance)))


def graded(completion: str, answer: str, contained: float) -> float:
    """Return 1 for the answer alone, `contained` for a text that has it, else 0."""
    if bare(completion) == bare(answer):
        return 1.0
    return contained if contained and contains(completion, answer) else 0.0


def asked_language(record: Record) -> str:
    """Return our code of the record's language; raise `UserError` where it has none or an unknown one."""
    code = record.get("language")
    if not isinstance(code, str) or code == "und":
        raise UserError(
            f"the record's language is {short_repr(code)}",
            hint="add a field `language` with a code, such as de",
        )
    return language(code).code


def _expected_number(record: Record) -> Decimal:
    answer = record.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return Decimal(str(check_number("the record's answer", answer)))
    found = (
        numbers(answer, asked_language(record) if record.get("language") else None)
        if isinstance(answer, str)
        else []
    )
    if not found:
        raise UserError(
            f"the record's answer is {short_repr(answer)}", hint="it must be a number, or text with one"
        )
    return found[-1]


# A minus sign directly after a letter or digit is a hyphen or a difference.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\d(?:[\d.,'٬٫]*\d)?")


def numbers(text: str, code: str | None = None) -> list[Decimal]:
    """Return the numbers of a text, in order.

    Args:
        text: with digits of any script.
        code: language, whose signs for decimals and groups are taken; None: those of English.
    """
    plain = "".join(_plain(character) for character in text)
    decimal, group = _number_signs(code)
    found = []
    for match in _NUMBER.finditer(plain):
        found += _read_number(match.group(), decimal, group)
    return found


def _plain(character: str) -> str:
    """Return a digit or sign of a number as ASCII's where it has one; no-break spaces become nothing."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return {"−": "-", "–": "-", "٫": "٫", "’": "'", "\u00a0": "", "\u202f": "", "\u2009": ""}.get(
        character, character
    )


def _number_signs(code: str | None) -> tuple[str, str]:
    """Return the signs for decimals and groups in a language: of CLDR, else English's."""
    from babel import Locale, UnknownLocaleError

    try:
        symbols = Locale.parse((code or "en").replace("-", "_")).number_symbols
    except (UnknownLocaleError, ValueError):
        return ".", ","
    latin = symbols.get("latn", symbols)
    return str(latin.get("decimal", ".")), str(latin.get("group", ","))


def _read_number(part: str, decimal: str, group: str) -> list[Decimal]:
    """Read `1.234,5` by the signs of a language; the other language's reading where groups are not of three."""
    part = part.replace("٬", "").replace("٫", decimal).replace("'", "")
    whole, point, rest = part.partition(decimal)
    if group in whole and not re.fullmatch(
        rf"-?\d{{1,3}}(?:{re.escape(group)}\d{{2,3}})*{re.escape(group)}\d{{3}}", whole
    ):
        # 2.5 in German, 3,4 in English: the sign for groups cannot separate groups here.
        pieces = part.replace(",", ".").split(".")
        if len(pieces) == 2:
            return [Decimal(".".join(pieces))]
        return [Decimal(piece) for piece in pieces if piece not in ("", "-")]
    whole = whole.replace(group, "")
    rest = re.sub(r"\D.*", "", rest)
    return [Decimal(f"{whole}.{rest}" if point and rest else whole)]
