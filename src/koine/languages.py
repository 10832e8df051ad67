"""Languages: codes, names, scripts, families, and their roles in the universal-tokenizer study.

Names, own names and scripts are CLDR's. `family` is ours: the branch at which a bucket of the study makes
sense (Germanic, not Indo-European). The study (arXiv 2506.10766) gives the sizes of its clusters (27
European, 20 Asian, 15 Middle-Eastern and Indic) and the names of its seven unseen languages, but not the
members. Which 62 languages are marked `seen` here is our choice.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from types import MappingProxyType

from koine.errors import UserError, did_you_mean, nearest

CLUSTERS = ("european", "asian", "middle-eastern-indic")


@dataclass(frozen=True)
class Language:
    """One language in one script."""

    code: str
    """BCP-47: `de`, `zh-Hant`."""
    iso639_3: str
    name: str
    own_name: str
    script: str
    """ISO 15924: `Latn`."""
    family: str
    cluster: str
    """`european`, `asian`, `middle-eastern-indic` or `none`."""
    role: str
    """Role in the universal-tokenizer study: `seen` (62, our choice), `unseen` (7, the paper's) or `none`."""

    def __str__(self) -> str:
        return self.code


def _read() -> dict[str, Language]:
    lines = resources.files("koine").joinpath("languages.tsv").read_text(encoding="utf-8").splitlines()
    return {fields[0]: Language(*fields) for fields in (line.split("\t") for line in lines[1:])}


LANGUAGES: Mapping[str, Language] = MappingProxyType(_read())
"""All languages by BCP-47 code."""

# Members of macrolanguages, and old codes, as FLORES-200 and other collections write them.
_ALIASES = {
    "arb": "ar",
    "cmn": "zh",
    "pes": "fa",
    "prs": "fa",
    "als": "sq",
    "khk": "mn",
    "npi": "ne",
    "lvs": "lv",
    "uzn": "uz",
    "azj": "az",
    "nob": "nb",
    "no": "nb",
    "nor": "nb",
    "zsm": "ms",
    "swh": "sw",
    "gaz": "om",
    "pbt": "ps",
    "pbu": "ps",
    "kmr": "ku",
    "ydd": "yi",
    "quz": "qu",
    "quy": "qu",
    "tgl": "fil",
    "tl": "fil",
    "plt": "mg",
    "ekk": "et",
    "ory": "or",
    "ayr": "ay",
    "dik": "dik",
    "fuv": "ff",
    "knc": "kr",
    "twi": "ak",
    "tw": "ak",
    "iw": "he",
    "in": "id",
    "ji": "yi",
    "mo": "ro",
    "sh": "sr-Latn",
    "alb": "sq",
    "chi": "zh",
    "may": "ms",
    "per": "fa",
    "cze": "cs",
    "ger": "de",
    "gre": "el",
    "fre": "fr",
    "arm": "hy",
    "ice": "is",
    "geo": "ka",
    "mao": "mi",
    "mac": "mk",
    "bur": "my",
    "dut": "nl",
    "rum": "ro",
    "slo": "sk",
    "wel": "cy",
    "tib": "bo",
    "baq": "eu",
    "zh-tw": "zh-Hant",
    "zh-hk": "zh-Hant",
    "zh-mo": "zh-Hant",
}
_WELL_FORMED = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})*(-[a-z0-9](-[a-z0-9]{1,8})+)*")


@functools.cache
def _index() -> dict[str, str]:
    """Return our code for every lower-case code of any kind."""
    index = {}
    for code, entry in LANGUAGES.items():
        if "-" not in code:
            index[entry.iso639_3] = code
    index |= {alias: code for alias, code in _ALIASES.items() if code in LANGUAGES}
    return index | {code.lower(): code for code in LANGUAGES}


@functools.cache
def language(code: str) -> Language:
    """Return the language of a code.

    A code is BCP-47 (`de`, `pt-BR`, `zh-Hant`), ISO 639-3 (`deu`), or one with a script (`deu_Latn`,
    `kas_Deva`). Regions, variants and private subtags are dropped. A script other than the language's usual
    one gives a language of its own (`uz-Cyrl`).

    Raises:
        UserError: The code is not in the table, or CLDR does not know a subtag; names the nearest ones.
    """
    index = _index()
    given = code.strip().replace("_", "-").lower()
    if given in index:
        return LANGUAGES[index[given]]
    head, *rest = given.split("-")
    if head in index and _WELL_FORMED.fullmatch(given):
        if rest and rest[0] in index and len(rest[0]) == 3:
            # The macrolanguage first (`zh-yue`).
            return language("-".join(rest))
        found = LANGUAGES[index[head]]
        script, region = _script_and_region(code, rest)
        base = found.code.split("-")[0]
        if script is None and f"{base}-{region}" in _ALIASES:
            return LANGUAGES[_ALIASES[f"{base}-{region}"]]
        if script in (None, found.script) or {script, found.script} <= {"Hang", "Kore"}:
            return found
        if script == LANGUAGES[base].script:
            return LANGUAGES[base]
        with_script = f"{base}-{script}"
        return LANGUAGES.get(with_script) or replace(
            found, code=with_script, script=script, cluster="none", role="none"
        )
    raise UserError(f"unknown language '{code}'", hint=_suggestion(code))


@functools.cache
def _subtags() -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return CLDR's scripts (ISO 15924), regions (ISO 3166, UN M.49) and variants, in the case of BCP-47."""
    from babel import Locale

    english = Locale("en")
    return (
        frozenset(english.scripts),
        frozenset(english.territories),
        frozenset(variant.lower() for variant in english.variants),
    )


def _script_and_region(code: str, subtags: list[str]) -> tuple[str | None, str | None]:
    """Return script and region (lower case) among subtags; raise `UserError` for unknown ones."""
    scripts, regions, variants = _subtags()
    script = region = None
    for part in subtags:
        if len(part) == 1:
            # Extensions and private use: any subtags may follow.
            break
        if script is None and part.title() in scripts:
            script = part.title()
        elif region is None and part.upper() in regions:
            region = part
        elif part not in variants:
            if len(part) <= 3:
                hint = "regions are ISO 3166 (BR) or UN M.49 (419)"
            else:
                hint = did_you_mean(part.title(), [*scripts, *variants])
            raise UserError(f"unknown subtag '{part}' of the language code '{code}'", hint=hint)
    return script, region


def _suggestion(code: str) -> str:
    by_name = {entry.name.lower(): entry for entry in LANGUAGES.values()}
    by_name |= {entry.own_name.lower(): entry for entry in LANGUAGES.values()}
    found = [by_name[name] for name in nearest(code, by_name, count=2)]
    found += [LANGUAGES[_index()[near]] for near in nearest(code, _index(), count=8)]
    # Short codes are near to everything: those that begin alike go first.
    found.sort(key=lambda entry: not code.lower().startswith(entry.code[:2]))
    shown = dict.fromkeys(f"'{entry.code}' ({entry.name})" for entry in found)
    if shown:
        return f"did you mean {' or '.join(list(shown)[:3])}?"
    return (
        "codes are BCP-47 (de), ISO 639-3 (deu) or with a script (deu_Latn); "
        "docs/reference/languages.md lists them"
    )


def parse_languages(text: str) -> tuple[str, ...]:
    """Parse `de,hi,ja` into our codes; raise `UserError` for unknown codes, repeated ones, or none."""
    codes = tuple(language(part).code for part in text.split(",") if part.strip())
    if not codes:
        raise UserError("no language is named", hint="give codes separated by commas, for example de,hi,ja")
    for code in codes:
        if codes.count(code) > 1:
            raise UserError(f"the language '{code}' is named twice", hint="name each language once")
    return codes


def check_cluster(cluster: str) -> None:
    """Raise `UserError` for an unknown cluster, with the nearest ones."""
    if cluster not in CLUSTERS:
        raise UserError(f"unknown cluster '{cluster}'", hint=did_you_mean(cluster, CLUSTERS))


def cluster_languages(cluster: str) -> tuple[str, ...]:
    """Return the codes of a cluster's languages; raise `UserError` for an unknown cluster."""
    check_cluster(cluster)
    return tuple(entry.code for entry in LANGUAGES.values() if entry.cluster == cluster)


def bucket(code: str) -> tuple[str, str]:
    """Return the bucket of the study: family and script. `und` (unknown) is a bucket of its own."""
    if code == "und":
        return ("unknown", "unknown")
    found = language(code)
    return found.family, found.script
