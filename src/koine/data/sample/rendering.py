"""Render a fact in a language: as a sentence, and as a question with its exact answer."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence

from babel.dates import format_date
from babel.lists import format_list
from babel.numbers import format_currency, format_decimal

from koine.data.sample.coverage import locale_of
from koine.data.sample.facts import SCRIPTED, territories
from koine.data.sample.phrases import phrases

# For languages without phrases: CLDR's names, joined by signs that every script uses.
_PLAIN = {
    "currency": "{x}: {y}",
    "language": "{x}: {y}",
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
    if kind in ("currency", "language"):
        currency, spoken = _territories()[rest]
        name = locale.territories.get(rest)
        answer = locale.currencies.get(currency) if kind == "currency" else locale.languages.get(spoken[0])
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


def sentence(code: str, fact: str) -> str | None:
    """Return the fact as a sentence; `None` if CLDR lacks a name."""
    found = sides(code, fact)
    if found is None:
        return None
    kind = fact.partition(":")[0]
    return _template(code, kind).replace("{x}", found[0]).replace("{y}", found[1])


def _template(code: str, kind: str) -> str:
    own = phrases().get(code)
    return _PLAIN[kind] if own is None else own[f"says_{_SAYS.get(kind, kind)}"]


def enumeration(code: str, items: Sequence[str]) -> str:
    """Join items as the language joins a list, as a sentence."""
    return _template(code, "list").replace("{x}", format_list(list(items), locale=locale_of(code)))


def question(code: str, fact: str, wording: int) -> tuple[str, str] | None:
    """Return question and exact answer, in the first or second wording of the language."""
    found = sides(code, fact)
    if found is None:
        return None
    kind = fact.partition(":")[0]
    kind = _SAYS.get(kind, kind)
    own = phrases()[code]
    wordings = [own[name] for name in (f"{kind}1", f"{kind}2") if name in own]
    return wordings[wording % len(wordings)].replace("{x}", found[0]), found[1]


def quantities(code: str, unit: str, numbers: Sequence[int]) -> list[str]:
    """Count a unit, with the plural form of each number."""
    return [_quantity(number, unit, code) for number in numbers]


def names(code: str, kind: str, keys: Sequence[str]) -> list[str]:
    """Return names of languages, scripts, currencies or territories, without those that CLDR lacks."""
    known = getattr(locale_of(code), kind)
    return [str(known[key]) for key in keys if key in known]
