"""Identify the language of a text: by its script where that decides, else by py3langid's naive Bayes model.

Deterministic and without a network: the model (139 languages, 4.5 MB) comes with the package `py3langid` of
the extra `langid`. Codes are those of `koine.languages`. The model knows languages, not scripts: `sr` and
`sr-Latn`, `zh` and `zh-Hant` are told apart by the letters.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from koine.errors import UserError, did_you_mean
from koine.extras import import_extra
from koine.languages import LANGUAGES, language

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

UNDETERMINED = "und"
"""BCP-47's code for a language that cannot be told, for example that of a number."""

CHINESE = frozenset({"Hans", "Hant"})
HAN = CHINESE | {"Jpan"}
"""Scripts (ISO 15924) whose texts may be Han characters alone."""
KANA_SHARE = 0.05
"""Share of kana among Han characters and kana from which a text is Japanese; Chinese texts quote a few."""
# Unicode's scripts that are part of a script of ISO 15924 with another name.
_PART_OF = {"Hira": "Jpan", "Kana": "Jpan", "Hang": "Kore", "Bopo": "Hant"}
_NOT_A_SCRIPT = frozenset({"Zyyy", "Zinh", "Zzzz"})

ALONE = {
    "Armn": "hy",
    "Ethi": "am",
    "Geor": "ka",
    "Grek": "el",
    "Gujr": "gu",
    "Guru": "pa",
    "Hebr": "he",
    "Jpan": "ja",
    "Khmr": "km",
    "Knda": "kn",
    "Kore": "ko",
    "Laoo": "lo",
    "Mlym": "ml",
    "Mymr": "my",
    "Orya": "or",
    "Sinh": "si",
    "Taml": "ta",
    "Telu": "te",
    "Thai": "th",
}
"""Scripts (ISO 15924) that decide the language without a model, and the language of each.

Some have further, much rarer languages (Yiddish, Ancient Greek): name them as candidates to find them."""

VARIETIES = frozenset({"ary", "arz", "pcm", "wuu", "yue"})
"""Languages that a text is only when they are candidates: the model takes Arabic, Chinese or English for them."""


class Identified(NamedTuple):
    """The language of a text."""

    code: str
    """BCP-47, a code of `koine.languages.LANGUAGES`; `und` without letters, or in no candidate's script."""
    probability: float
    """Share of the text in the language's script, times the probability of the language in that script."""


def identify(text: str, candidates: Collection[str] | None = None) -> Identified:
    """Identify the language of a text.

    Args:
        text: Any text. Digits, punctuation and symbols say nothing.
        candidates: Codes of the languages that are possible; None: all that can be identified. Fewer
            candidates make short texts reliable: English or Polish is easy, Croatian or Bosnian is not.

    Raises:
        UserError: A candidate is unknown, there is none, or two share a script and the model does not know
            one of them; the extra `langid` is missing where the script does not decide.
    """
    possible = _candidates(candidates)
    script, share = dominant_script(text)
    if script is None:
        return Identified(UNDETERMINED, 0.0)
    if possible is None:
        if script in ALONE:
            return Identified(ALONE[script], share)
        codes = tuple(code for code in _codes_of_model(script) if code not in VARIETIES)
    else:
        codes = _in_script(possible, script)
    if len(codes) == 1:
        return Identified(codes[0], share)
    if not codes:
        return Identified(UNDETERMINED, 0.0)
    code, probability = _most_probable(text, codes, script)
    return Identified(code, share * probability)


def identifiable() -> tuple[str, ...]:
    """Return the codes that `identify` can return without candidates, sorted."""
    scripts = {entry.script for entry in LANGUAGES.values()}
    found = {code for script in scripts - ALONE.keys() for code in _codes_of_model(script)}
    return tuple(sorted((found - VARIETIES) | set(ALONE.values())))


def dominant_script(text: str) -> tuple[str | None, float]:
    """Return the script (ISO 15924) with most of a text's letters, and its share; None without letters.

    Letters are weighted by their bytes in UTF-8, because a Han character says more than a Latin letter. Han
    characters count as Japanese beside kana, else as `Hant` or `Hans` by the characters that only one of
    the two character sets Big5 and GB 2312 has; `Hans` where none decides.
    """
    from fontTools.unicodedata import script as script_of

    weights: Counter[str] = Counter()
    for character, count in Counter(text).items():
        found = script_of(character)
        if found not in _NOT_A_SCRIPT and unicodedata.category(character)[0] in "LM":
            weights[_PART_OF.get(found, found)] += count * len(character.encode("utf-8", "surrogatepass"))
    if han := weights.pop("Hani", 0):
        kana = weights["Jpan"]
        weights["Jpan" if kana > KANA_SHARE * (kana + han) else _chinese_script(text)] += han
    if not weights:
        return None, 0.0
    # The name breaks ties, so that the order of the letters does not.
    script, weight = max(weights.items(), key=lambda item: (item[1], item[0]))
    return script, weight / weights.total()


def _chinese_script(text: str) -> str:
    """Return `Hant` if more characters are only in Big5 than only in GB 2312, else `Hans`."""
    balance = 0
    for character in text:
        traditional, simplified = _has(character, "big5"), _has(character, "gb2312")
        balance += traditional - simplified
    return "Hant" if balance > 0 else "Hans"


def _has(character: str, charset: str) -> bool:
    try:
        character.encode(charset)
    except UnicodeEncodeError:
        return False
    return True


def _candidates(given: Collection[str] | None) -> tuple[str, ...] | None:
    """Return our codes for the candidates; raise `UserError` for an unknown one or for none at all."""
    if given is None:
        return None
    if not given:
        raise UserError("no candidate language is given", hint="give at least one code, or None for all")
    return tuple(dict.fromkeys(language(code).code for code in given))


def _in_script(codes: tuple[str, ...], script: str) -> tuple[str, ...]:
    """Return the codes that are written in a script.

    Han characters alone may be Japanese too, and the other kind of Chinese where the text's own is no candidate.
    """
    scripts = frozenset({script})
    if script in CHINESE:
        scripts = (
            frozenset({script, "Jpan"}) if any(language(code).script == script for code in codes) else HAN
        )
    return tuple(code for code in codes if language(code).script in scripts)


@functools.cache
def _model() -> LanguageIdentifier:
    """Load the model once (0.3 s, 60 MB); raise `UserError` where the extra is missing."""
    module = import_extra("py3langid.langid", extra="langid", purpose="identify the language of a text")
    return module.LanguageIdentifier.from_model_file(module.MODEL_FILE)


@functools.cache
def _labels() -> dict[str, str]:
    """Return the model's label for each language that it knows, by the code without a script."""
    labels = {}
    for label in _model().labels:
        try:
            labels[language(label).code.split("-")[0]] = label
        except UserError:
            # `zxx` (no language) and a few languages that Koine's table does not have.
            continue
    return labels


@functools.cache
def _codes_of_model(script: str) -> tuple[str, ...]:
    """Return our codes of the languages that the model knows, in a script."""
    labels = _labels()
    return tuple(
        code for code, entry in LANGUAGES.items() if entry.script == script and code.split("-")[0] in labels
    )


def _most_probable(text: str, codes: tuple[str, ...], script: str) -> tuple[str, float]:
    """Return the most probable of `codes` and its probability among them.

    The model's log-posteriors are divided by the square root of the bytes, as py3langid does: naive Bayes
    counts dependent features as independent and would be far too sure of long texts.
    """
    labels = _labels()
    unknown = [code for code in codes if code.split("-")[0] not in labels]
    if unknown:
        raise UserError(
            f"the language identifier does not know '{unknown[0]}' and cannot tell it from other languages in "
            f"the script {script}",
            hint=did_you_mean(unknown[0], labels),
        )
    scores = dict(_model().rank(text))
    temperature = math.sqrt(len(text.encode("utf-8", "surrogatepass")))
    logits = [float(scores[labels[code.split("-")[0]]]) / temperature for code in codes]
    best = max(range(len(codes)), key=logits.__getitem__)
    return codes[best], 1.0 / sum(math.exp(logit - logits[best]) for logit in logits)
