"""Facts of the sample world, independent of language, and their splits.

A fact has an identifier such as `currency:JP` or `sum:7+12`, and a split; both are the same in every
language:

- `train`: in documents, dialogues and training questions;
- `recall`: in documents and dialogues, but in no training question of the chat stage: its question measures
  what pretraining learnt, in a wording that is in no training text;
- `heldout_fact`: computable (sums, quantities, amounts, dates), in no training text: measures generalisation;
- `heldout_territory`: about a territory that is in no training text.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from dataclasses import dataclass

from babel.core import get_global
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from koine.data.sample.phrases import QUESTION_LANGUAGES

TERRITORIAL = ("currency", "language", "capital")
"""Kinds of facts about a territory."""

SPLITS = ("train", "recall", "heldout_fact", "heldout_territory")
HELD_OUT_TERRITORIES = 0.12
RECALL = 0.2
HELD_OUT_FACTS = 0.25
NEVER_HELD_OUT = frozenset({"WS", "JP"})
"""Another territory's name contains that of Samoa; Japan is the example of the manual."""

UNITS = (
    "duration-day",
    "duration-hour",
    "duration-week",
    "duration-month",
    "duration-year",
    "length-kilometer",
    "mass-kilogram",
)
"""Units of the quantities (CLDR's names)."""
CURRENCIES = ("EUR", "USD", "JPY", "INR", "CNY", "BRL", "TRY", "PLN")
"""Currencies of the amounts."""
SCRIPTED = {
    "en": "Latn", "de": "Latn", "fr": "Latn", "es": "Latn", "it": "Latn", "pt": "Latn", "nl": "Latn",
    "pl": "Latn", "tr": "Latn", "vi": "Latn", "sw": "Latn", "id": "Latn", "fi": "Latn", "hu": "Latn",
    "ru": "Cyrl", "uk": "Cyrl", "bg": "Cyrl", "kk": "Cyrl", "mk": "Cyrl", "be": "Cyrl", "ar": "Arab",
    "fa": "Arab", "ur": "Arab", "ps": "Arab", "hi": "Deva", "ne": "Deva", "mr": "Deva", "bn": "Beng",
    "el": "Grek", "he": "Hebr", "hy": "Armn", "ka": "Geor", "ta": "Taml", "te": "Telu", "kn": "Knda",
    "ml": "Mlym", "gu": "Gujr", "pa": "Guru", "th": "Thai", "lo": "Laoo", "km": "Khmr", "my": "Mymr",
    "am": "Ethi", "si": "Sinh", "ja": "Jpan", "ko": "Kore",
}  # fmt: skip
"""Languages whose script is a fact, and that script."""


ASKED_TERRITORIES = 30
"""Number of territories that questions ask about."""
PROMINENT = (
    "US", "IN", "CN", "BR", "RU", "JP", "DE", "FR", "GB", "MX", "ID", "TR", "EG", "IT", "ES", "KR", "IR",
    "VN", "TH", "PL", "AR", "SA", "PK", "BD", "PH", "NG", "UA", "CA", "AU", "GR", "FI", "IL", "MM", "PT",
    "NL", "SE", "CH", "AT", "IQ", "MA", "CO", "PE", "CL", "KE", "ET", "ZA", "NO", "DK", "CZ", "HU", "RO",
    "BG", "MY", "SG", "NZ", "IE", "BE", "LK", "NP", "KZ",
)  # fmt: skip
"""Territories that are mentioned most, in this order (ours)."""


CAPITALS = {
    "RU": "Europe/Moscow", "JP": "Asia/Tokyo", "DE": "Europe/Berlin", "FR": "Europe/Paris",
    "GB": "Europe/London", "ID": "Asia/Jakarta", "EG": "Africa/Cairo", "IT": "Europe/Rome",
    "ES": "Europe/Madrid", "KR": "Asia/Seoul", "IR": "Asia/Tehran", "TH": "Asia/Bangkok",
    "PL": "Europe/Warsaw", "AR": "America/Argentina/Buenos_Aires", "SA": "Asia/Riyadh", "BD": "Asia/Dhaka",
    "PH": "Asia/Manila", "GR": "Europe/Athens", "FI": "Europe/Helsinki", "PT": "Europe/Lisbon",
    "NL": "Europe/Amsterdam", "SE": "Europe/Stockholm", "AT": "Europe/Vienna", "IQ": "Asia/Baghdad",
    "CO": "America/Bogota", "PE": "America/Lima", "CL": "America/Santiago", "KE": "Africa/Nairobi",
    "ET": "Africa/Addis_Ababa", "NO": "Europe/Oslo", "DK": "Europe/Copenhagen", "CZ": "Europe/Prague",
    "HU": "Europe/Budapest", "RO": "Europe/Bucharest", "BG": "Europe/Sofia", "MY": "Asia/Kuala_Lumpur",
    "IE": "Europe/Dublin", "BE": "Europe/Brussels", "CU": "America/Havana", "LV": "Europe/Riga",
    "LT": "Europe/Vilnius", "EE": "Europe/Tallinn", "HR": "Europe/Zagreb", "RS": "Europe/Belgrade",
    "SI": "Europe/Ljubljana", "SK": "Europe/Bratislava", "AL": "Europe/Tirane", "MK": "Europe/Skopje",
    "BA": "Europe/Sarajevo", "MD": "Europe/Chisinau", "BY": "Europe/Minsk", "AM": "Asia/Yerevan",
    "AZ": "Asia/Baku", "GE": "Asia/Tbilisi", "KG": "Asia/Bishkek", "TJ": "Asia/Dushanbe",
    "AF": "Asia/Kabul", "JO": "Asia/Amman", "LB": "Asia/Beirut", "SY": "Asia/Damascus",
    "KP": "Asia/Pyongyang", "GH": "Africa/Accra", "SN": "Africa/Dakar", "UG": "Africa/Kampala",
    "SD": "Africa/Khartoum", "SO": "Africa/Mogadishu", "TN": "Africa/Tunis", "LY": "Africa/Tripoli",
    "ZM": "Africa/Lusaka", "ZW": "Africa/Harare", "UY": "America/Montevideo", "PY": "America/Asuncion",
    "VE": "America/Caracas",
}  # fmt: skip
"""Territories whose capital is a city that CLDR names in every language, as that of a time zone."""


@dataclass(frozen=True)
class Territory:
    """A territory with one current currency and its official languages."""

    code: str
    currency: str
    languages: tuple[str, ...]


def share_of(identifier: str) -> float:
    """Return a number in [0, 1) that depends only on the identifier."""
    digest = hashlib.blake2b(identifier.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@functools.cache
def territories() -> tuple[Territory, ...]:
    """Return territories with a current currency and an official language that CLDR names, by code."""
    found = []
    known = set(get_global("likely_subtags"))
    today = datetime.date(2025, 1, 1)
    for code in sorted(get_global("territory_currencies")):
        if len(code) != 2 or not code.isalpha() or code in ("EU", "ZZ"):
            continue
        currencies = get_territory_currencies(code, start_date=today)
        spoken = tuple(name for name in get_official_languages(code) if "_" not in name and name in known)
        if len(currencies) >= 1 and spoken:
            # If another country's money is legal tender too (Bhutan, Lesotho), take the country's own:
            # ISO 4217 codes begin with the code of the issuing country.
            own = next((currency for currency in currencies if currency.startswith(code)), currencies[0])
            found.append(Territory(code, own, spoken))
    return tuple(found)


def split_of(identifier: str) -> str:
    """Return the split of a fact."""
    kind, _, rest = identifier.partition(":")
    if kind in TERRITORIAL:
        if rest not in NEVER_HELD_OUT and share_of(f"territory:{rest}") < HELD_OUT_TERRITORIES:
            return "heldout_territory"
        return "recall" if share_of(identifier) < RECALL else "train"
    if kind in ("sum", "quantity", "amount", "date"):
        return "heldout_fact" if share_of(identifier) < HELD_OUT_FACTS else "train"
    return "recall" if share_of(identifier) < RECALL else "train"


@functools.cache
def prominence(identifier: str) -> float:
    """Return the relative frequency of a fact among others of its kind.

    As in real text, a few territories are mentioned all the time.
    """
    kind, _, rest = identifier.partition(":")
    if kind not in TERRITORIAL:
        return 1.0
    return 1.0 / (PROMINENT.index(rest) + 20) if rest in PROMINENT else 0.001


def is_asked(identifier: str) -> bool:
    """Whether questions ask for a fact: of territories and scripts, only those that are mentioned most."""
    kind, _, rest = identifier.partition(":")
    if kind == "script":
        return rest in QUESTION_LANGUAGES
    return kind not in TERRITORIAL or rest in PROMINENT[:ASKED_TERRITORIES]


@functools.cache
def facts() -> dict[str, tuple[str, ...]]:
    """Return identifiers by kind, in a fixed order."""
    numbers = range(1, 13)
    return {
        "currency": tuple(f"currency:{t.code}" for t in territories()),
        "language": tuple(f"language:{t.code}" for t in territories()),
        "capital": tuple(f"capital:{t.code}" for t in territories() if t.code in CAPITALS),
        "script": tuple(f"script:{code}" for code in SCRIPTED),
        "month": tuple(f"month:{month}" for month in range(1, 13)),
        "day": tuple(f"day:{day}" for day in range(7)),
        "sum": tuple(f"sum:{a}+{b}" for a in numbers for b in numbers),
        "quantity": tuple(
            f"quantity:{unit}:{a}+{b}" for unit in UNITS for a in range(1, 13) for b in range(1, 13)
        ),
        "amount": tuple(
            f"amount:{currency}:{a}+{b}"
            for currency in CURRENCIES
            for a in range(1, 10)
            for b in range(1, 10)
        ),
        "date": tuple(
            f"date:2025-{month:02d}-{day:02d}+{days}"
            for month in range(1, 13)
            for day in range(1, 29, 3)
            for days in (1, 2, 3, 7)
        ),
    }


@functools.cache
def facts_in(split: str) -> dict[str, tuple[str, ...]]:
    """Return the identifiers of one split, by kind."""
    return {kind: tuple(name for name in names if split_of(name) == split) for kind, names in facts().items()}
