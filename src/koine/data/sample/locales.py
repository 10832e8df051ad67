"""CLDR data of one language, isolated from that of others.

Babel writes resolved aliases into dictionaries that its locales share. So a language's names of months and
its counting could depend on the language that was used first. Each locale here is read from Babel's files
anew.
"""

from __future__ import annotations

import functools
import pickle
from typing import Any

from babel import Locale, localedata
from babel.core import get_global

PLURALS = ("zero", "one", "two", "few", "many", "other")


class IsolatedLocale(Locale):  # type: ignore[misc]
    """A Babel locale whose data is not shared."""

    @functools.cached_property
    def _own(self) -> localedata.LocaleDataDict:
        data: dict[str, Any] = {}
        for name in ("root", *_ancestors(str(self))):
            localedata.merge(data, _file(name))
        return localedata.LocaleDataDict(data)

    @property
    def _data(self) -> localedata.LocaleDataDict:
        return self._own

    def unit_pattern(self, unit: str, number: int) -> str | None:
        """Return the pattern that counts a unit, in the number's plural form, else the general form.

        The long pattern, else the short one: CLDR leaves out a long form that equals the short one. The
        root's symbols (km, kg) hold for every language, its durations ("{0} d") for none.
        """
        for length in ("long", "short", "narrow"):
            patterns: dict[str, str] = {}
            shared = () if unit.startswith("duration-") else ("root",)
            for name in (*shared, *_ancestors(str(self))):
                forms = _plain(_plain(_units(name).get(unit)).get(length))
                patterns |= {
                    key: form for key, form in forms.items() if key in PLURALS and isinstance(form, str)
                }
            pattern = patterns.get(self.plural_form(number)) or patterns.get("other")
            if pattern:
                return pattern
        return None


@functools.cache
def isolated(identifier: str) -> IsolatedLocale:
    """Return the locale of an identifier such as `sr_Latn`. Raises what `Locale.parse` raises."""
    parsed = Locale.parse(identifier)
    return IsolatedLocale(parsed.language, territory=parsed.territory, script=parsed.script)


def _file(name: str) -> dict[str, Any]:
    """Return the content of one of Babel's data files, a new copy each time."""
    return pickle.loads(_bytes(name))  # type: ignore[no-any-return]


@functools.cache
def _units(name: str) -> dict[str, Any]:
    """Return the unit patterns of a data file; read-only."""
    return _plain(_file(name).get("unit_patterns"))


@functools.cache
def _bytes(name: str) -> bytes:
    with open(localedata.resolve_locale_filename(name), "rb") as file:  # noqa: PTH123
        return file.read()


def _ancestors(identifier: str) -> list[str]:
    """Return the locale's data files from general to specific, without the root (CLDR's inheritance)."""
    found = [identifier]
    while True:
        parent = get_global("parent_exceptions").get(found[0])
        if parent is None:
            shorter, _, last = found[0].rpartition("_")
            parent = "root" if not shorter or len(last) == 4 else shorter
        if parent == "root":
            return found
        found.insert(0, parent)


def _plain(value: Any) -> dict[Any, Any]:
    """Return a branch of raw locale data without its alias."""
    if isinstance(value, tuple):
        value = value[1]
    return value if isinstance(value, dict) else {}
