"""Render a fact in a language: as a sentence, and as a question with its exact answer."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import cast

from babel.dates import format_date
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal

from koine.data.sample.coverage import locale_of
from koine.data.sample.facts import CAPITALS, SCRIPTED, TERRITORIAL, territories
from koine.data.sample.phrases import phrases, wordings
from koine.data.sample.subjects import subject_forms

# For languages without phrases: CLDR's names, joined by signs that every script uses.
_PLAIN = {
    "currency": "{x}: {y}",
    "language": "{x}: {y}",
    "capital": "{x}: {y}",
    "script": "{x}: {y}",
    "month": "{x}, {y}",
    "day": "{x}, {y}",
    "sum": "{x} = {y}",
    "quantity": "{x} = {y}",
    "amount": "{x} = {y}",
    "date": "{x} = {y}",
    "list": "{x}",
}
_SAYS = {"quantity": "sum", "amount": "sum"}


@functools.cache
def _territories() -> dict[str, tuple[str, tuple[str, ...]]]:
    return {t.code: (t.currency, t.languages) for t in territories()}


@functools.cache
def calendar_names(code: str, kind: str) -> dict[int, str]:
    """Return names of `months` (1 to 12) or `days` (Monday is 0), in stand-alone form if there is one."""
    names = getattr(locale_of(code), kind)["stand-alone"]["wide"]
    return {number: str(name) for number, name in names.items()}


@functools.cache
def sides(code: str, fact: str) -> tuple[str, str] | None:
    """Return subject and exact answer of a fact in a language; `None` if CLDR lacks a name."""
    locale = locale_of(code)
    kind, _, rest = fact.partition(":")
    if kind in TERRITORIAL:
        name, answer = locale.territories.get(rest), _about_territory(code, kind, rest)
        return None if name is None or answer is None else (str(name), str(answer))
    if kind == "script":
        name, answer = locale.languages.get(rest), locale.scripts.get(SCRIPTED[rest])
        return None if name is None or answer is None else (str(name), str(answer))
    if kind in ("month", "day"):
        names = calendar_names(code, f"{kind}s")
        number = int(rest)
        following = number % 12 + 1 if kind == "month" else (number + 1) % 7
        return str(names[number]), str(names[following])
    left, _, right = rest.rpartition("+")
    if kind == "sum":
        a, b = int(left), int(right)
        return f"{format_decimal(a, locale=locale)} + {format_decimal(b, locale=locale)}", str(
            format_decimal(a + b, locale=locale)
        )
    if kind == "date":
        start, days = datetime.date.fromisoformat(left), int(right)
        asked = f"{_date(start, code)} + {_quantity(days, 'duration-day', code)}"
        return asked, _date(start + datetime.timedelta(days=days), code)
    unit, _, first = left.rpartition(":")
    show = _quantity if kind == "quantity" else _amount
    a, b = int(first), int(right)
    return f"{show(a, unit, code)} + {show(b, unit, code)}", show(a + b, unit, code)


def _about_territory(code: str, kind: str, territory: str) -> str | None:
    """Return a territory's currency, first official language or capital; `None` if CLDR lacks the name."""
    locale = locale_of(code)
    currency, spoken = _territories()[territory]
    if kind == "currency":
        return cast("str | None", locale.currencies.get(currency))
    if kind == "language":
        return cast("str | None", locale.languages.get(spoken[0]))
    # CLDR names a city only where its name differs from that in the time zone's identifier.
    zone = CAPITALS[territory]
    own = zone.rpartition("/")[2].replace("_", " ")
    return str(locale.time_zones.get(zone, {}).get("city") or own)


@functools.cache
def _quantity(number: int, unit: str, code: str) -> str:
    locale = locale_of(code)
    pattern = locale.unit_pattern(unit, number)
    if pattern is None:
        raise LookupError(f"CLDR has no pattern of {unit} in {code}")
    return pattern.replace("{0}", str(format_decimal(number, locale=locale))).strip()


@functools.cache
def _amount(number: int, currency: str, code: str) -> str:
    return str(
        format_currency(
            number,
            currency,
            format_type="name",
            currency_digits=False,
            format="#,##0",
            locale=locale_of(code),
        )
    )


@functools.cache
def _date(day: datetime.date, code: str) -> str:
    return str(format_date(day, format="long", locale=locale_of(code)))


def sentence(code: str, fact: str, wording: int = 0, *, answer: str | None = None) -> str | None:
    """Return the fact as a sentence, in one of the language's wordings; `None` if CLDR lacks a name.

    answer: stands in the place of the right one.
    """
    found = sides(code, fact)
    if found is None:
        return None
    kind = fact.partition(":")[0]
    filled = _filled(code, fact, _templates(code, kind), wording, found[0])
    return filled.replace("{y}", found[1] if answer is None else answer)


@functools.lru_cache(maxsize=8192)
def sentences_of(code: str, fact: str) -> tuple[str, ...]:
    """Return the fact as a sentence in all of the language's wordings; none if CLDR lacks a name."""
    found = (
        sentence(code, fact, wording) for wording in range(len(_templates(code, fact.partition(":")[0])))
    )
    return tuple(one for one in found if one is not None)


def plain_sentence(code: str, fact: str) -> str | None:
    """Return the fact as names and numbers joined by signs; `None` if CLDR lacks a name."""
    found = sides(code, fact)
    if found is None:
        return None
    return _PLAIN[fact.partition(":")[0]].replace("{x}", found[0]).replace("{y}", found[1])


def _templates(code: str, kind: str) -> tuple[str, ...]:
    own = phrases().get(code)
    return (_PLAIN[kind],) if own is None else own[f"says_{_SAYS.get(kind, kind)}"]


def _filled(code: str, fact: str, templates: Sequence[str], wording: int, subject: str) -> str:
    """Put the subject, in the form that it needs, into one of the templates."""
    kind, _, rest = fact.partition(":")
    forms = subject_forms(code, rest, subject) if kind in TERRITORIAL else {}
    text = templates[wording % len(templates)]
    for name, form in {"x": subject, **forms}.items():
        text = text.replace(f"{{{name}}}", form)
    return text


def enumeration(code: str, items: Sequence[str]) -> str:
    """Join items as the language joins a list, as a sentence."""
    return _templates(code, "list")[0].replace("{x}", format_list(list(items), locale=locale_of(code)))


def question(code: str, fact: str, wording: int) -> tuple[str, str] | None:
    """Return question and exact answer, in one of the language's wordings; `None` if CLDR lacks a name."""
    found = sides(code, fact)
    if found is None:
        return None
    kind = fact.partition(":")[0]
    templates = phrases()[code][_SAYS.get(kind, kind)]
    return _filled(code, fact, templates, wording, found[0]), found[1]


def wordings_of(kind: str) -> int:
    """Count the wordings of questions of a kind: the same in every language."""
    return wordings(_SAYS.get(kind, kind))


def quantities(code: str, unit: str, numbers: Sequence[int]) -> list[str]:
    """Count a unit, with the plural form of each number."""
    return [_quantity(number, unit, code) for number in numbers]


def names(code: str, kind: str, keys: Sequence[str]) -> list[str]:
    """Return names of languages, scripts, currencies or territories, without those that CLDR lacks."""
    known = getattr(locale_of(code), kind)
    return [str(known[key]) for key in keys if key in known]
