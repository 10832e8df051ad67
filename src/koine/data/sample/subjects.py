"""Names of territories as English, French and German put them into a sentence.

CLDR gives bare names ("Netherlands", "Schweiz", "France"). Articles and contractions are ours: rules, and the
names that break them.
"""

from __future__ import annotations

_ENGLISH_ARTICLES = frozenset(
    ["AE", "BQ", "BS", "CF", "DO", "GB", "GM", "IM", "IO", "KM", "MV", "NL", "PH", "PS", "SC", "US"]
)
# Nominative and genitive. Without an entry: no article.
_GERMAN: dict[str, tuple[str, str]] = {
    "AE": ("die Vereinigten Arabischen Emirate", "der Vereinigten Arabischen Emirate"),
    "BS": ("die Bahamas", "der Bahamas"),
    "CF": ("die Zentralafrikanische Republik", "der Zentralafrikanischen Republik"),
    "CH": ("die Schweiz", "der Schweiz"),
    "DO": ("die Dominikanische Republik", "der Dominikanischen Republik"),
    "GB": ("das Vereinigte Königreich", "des Vereinigten Königreichs"),
    "IQ": ("der Irak", "des Irak"),
    "IR": ("der Iran", "des Iran"),
    "KM": ("die Komoren", "der Komoren"),
    "LB": ("der Libanon", "des Libanon"),
    "MN": ("die Mongolei", "der Mongolei"),
    "MV": ("die Malediven", "der Malediven"),
    "NE": ("der Niger", "des Niger"),
    "NL": ("die Niederlande", "der Niederlande"),
    "PH": ("die Philippinen", "der Philippinen"),
    "SC": ("die Seychellen", "der Seychellen"),
    "SD": ("der Sudan", "des Sudan"),
    "SK": ("die Slowakei", "der Slowakei"),
    "SS": ("der Südsudan", "des Südsudan"),
    "TD": ("der Tschad", "des Tschad"),
    "TR": ("die Türkei", "der Türkei"),
    "UA": ("die Ukraine", "der Ukraine"),
    "US": ("die Vereinigten Staaten", "der Vereinigten Staaten"),
    "VA": ("die Vatikanstadt", "der Vatikanstadt"),
}  # fmt: skip
_GERMAN_PLURALS = frozenset(["AE", "BS", "KM", "MV", "NL", "PH", "SC", "US"])
_FRENCH_PLURALS = frozenset(
    [
        "AE",
        "AS",
        "AX",
        "BM",
        "BQ",
        "BS",
        "CK",
        "FJ",
        "FK",
        "FO",
        "IC",
        "KM",
        "KY",
        "MH",
        "MP",
        "MV",
        "NL",
        "PH",
        "PN",
        "PS",
        "SB",
        "SC",
        "TC",
        "US",
        "VG",
        "VI",
    ]
)
_FRENCH_WITHOUT_ARTICLE = frozenset(
    [
        "AD",
        "AG",
        "AI",
        "AW",
        "BB",
        "BH",
        "BL",
        "CU",
        "CW",
        "CY",
        "DJ",
        "DM",
        "GD",
        "GG",
        "GI",
        "GU",
        "HK",
        "HT",
        "IL",
        "JE",
        "KN",
        "LC",
        "MC",
        "MF",
        "MG",
        "MO",
        "MS",
        "MT",
        "MU",
        "NR",
        "NU",
        "OM",
        "PM",
        "PR",
        "RE",
        "SG",
        "SM",
        "ST",
        "SX",
        "TL",
        "TT",
        "TV",
        "TW",
        "VC",
        "WF",
        "WS",
        "YT",
    ]
)
# Gender is that of the last letter (e: feminine), but for these.
_FRENCH_MASCULINE = frozenset(["BZ", "CG", "KH", "MX", "MZ", "SR", "ZW"])
_FRENCH_FEMININE = frozenset(["GS", "GW", "KP", "KR", "MK"])
_FRENCH_VOWELS = frozenset("AEÉÈÊIÎOÔU")


def subject_forms(code: str, territory: str, name: str) -> dict[str, str]:
    """Return the forms of a territory's name (`the_x`, `of_x`, `in_x`, `has_x`) that a language's templates use."""
    if code == "en":
        article = territory in _ENGLISH_ARTICLES or name.endswith("Islands")
        return {"the_x": f"the {name}" if article else name}
    if code == "de":
        islands = name.endswith("inseln")
        otherwise = (f"die {name}", f"der {name}") if islands else (name, f"von {name}")
        nominative, genitive = _GERMAN.get(territory, otherwise)
        has = "haben" if islands or territory in _GERMAN_PLURALS else "hat"
        return {"of_x": genitive, "has_x": f"{has} {nominative}"}
    if code == "fr":
        return _french_forms(territory, name)
    return {}


def _french_forms(territory: str, name: str) -> dict[str, str]:
    vowel = name[0] in _FRENCH_VOWELS
    if territory in _FRENCH_PLURALS:
        bare = name.removeprefix("les ").removeprefix("Les ")
        return {"of_x": f"des {bare}", "in_x": f"aux {bare}"}
    if territory in _FRENCH_WITHOUT_ARTICLE:
        return {"of_x": f"d'{name}" if vowel else f"de {name}", "in_x": f"à {name}"}
    if vowel:
        return {"of_x": f"de l'{name}", "in_x": f"en {name}"}
    if territory in _FRENCH_FEMININE or (name.endswith("e") and territory not in _FRENCH_MASCULINE):
        return {"of_x": f"de la {name}", "in_x": f"en {name}"}
    return {"of_x": f"du {name}", "in_x": f"au {name}"}
