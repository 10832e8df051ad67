"""Find the languages that CLDR covers well enough for the sample world."""

from __future__ import annotations

import functools

from babel import UnknownLocaleError

from koine.data.sample.facts import SCRIPTED, UNITS, territories
from koine.data.sample.locales import IsolatedLocale, isolated
from koine.languages import LANGUAGES

NAMED = 0.9
"""Share of the sample world's names that CLDR must have in a language."""


@functools.cache
def locale_of(code: str) -> IsolatedLocale:
    """Return Babel's data of one of our languages."""
    return isolated(code.replace("-", "_"))


def covers(code: str) -> bool:
    """Return whether CLDR's data of a language is nearly complete for the sample world.

    It must have 90 % of the names of territories, currencies and languages, all months and days, and a
    pattern for each unit.
    """
    try:
        locale = locale_of(code)
    except (UnknownLocaleError, ValueError):
        return False
    world = territories()
    wanted = (
        (locale.territories, [t.code for t in world]),
        (locale.currencies, sorted({t.currency for t in world})),
        (locale.languages, sorted(SCRIPTED)),
    )
    for names, needed in wanted:
        if sum(name in names for name in needed) < NAMED * len(needed):
            return False
    months, days = locale.months["format"]["wide"], locale.days["format"]["wide"]
    if (
        len({str(months[m]) for m in months}) < 12
        or str(months[1]).startswith("M0")
        or len(set(days.values())) < 7
    ):
        return False
    return all(locale.unit_pattern(unit, 2) is not None for unit in UNITS)


@functools.cache
def sample_languages() -> tuple[str, ...]:
    """Return the codes of all languages in which the sample world can be written."""
    return tuple(code for code in LANGUAGES if covers(code))
