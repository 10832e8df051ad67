"""What needles, questions and answers sound like in a language.

`phrases.tsv` holds a row a language. Nothing that is inserted is inflected, and the sentence that answers (`fact`, `facts`, `variables`,
`words`) begins with the same words as the one that told it, so that a base model is asked by the beginning of a sentence. No question (`ask...`) holds those words: the nearest place where
they stand must be the needle. The row `und`
is made of signs alone and serves any language.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Phrases:
    """The phrases of a language; `{key}`, `{keys}`, `{value}`, `{values}`, `{names}` and `{x}` are filled in."""

    code: str
    quoted: str
    comma: str
    fact: str
    ask: str
    facts: str
    ask_facts: str
    variables: str
    ask_variables: str
    words: str
    ask_words: str
    question: str
    answer: str

    def quote(self, keys: Sequence[str]) -> str:
        """Keys in the language's quotation marks, with its commas between."""
        return self.comma.join(self.quoted.replace("{x}", key) for key in keys)

    def join(self, values: Sequence[str]) -> str:
        """Values with the language's commas between."""
        return self.comma.join(values)


def lead_and_answer(sentence: str, slot: str, value: str) -> tuple[str, str]:
    """The beginning of a sentence up to its `slot`, and what goes there: `("The number is", " 7")`. A space belongs to the answer."""
    before, _, _ = sentence.partition(slot)
    lead = before.rstrip(" ")
    return lead, before[len(lead) :] + value


@functools.cache
def _all_phrases() -> dict[str, Phrases]:
    text = resources.files("koine.evaluate.long_context").joinpath("phrases.tsv").read_text(encoding="utf-8")
    return {row[0]: Phrases(*row) for row in (line.split("\t") for line in text.splitlines()[1:])}


def phrase_languages() -> tuple[str, ...]:
    """The languages with phrases of their own, `und` among them."""
    return tuple(_all_phrases())


def phrases_of(language: str) -> Phrases:
    """The phrases of a language, in another script or region too (`pt-BR`); the neutral ones where it has none."""
    found = _all_phrases()
    return found.get(language) or found.get(language.split("-")[0]) or found["und"]


@functools.cache
def key_names(language: str) -> tuple[str, ...]:
    """Names of things for keys: CLDR's territories in the language, in English where it has none."""
    from koine.data.sample.coverage import sample_languages
    from koine.data.sample.facts import territories
    from koine.data.sample.rendering import names

    known = sample_languages()
    code = next((one for one in (language, language.split("-")[0]) if one in known), "en")
    return tuple(dict.fromkeys(names(code, "territories", [one.code for one in territories()])))


def draw_keys(language: str, count: int, rng: random.Random) -> list[str]:
    """`count` different keys; beyond the names that there are, with numbers behind them."""
    names = key_names(language)
    rounds = -(-count // len(names))
    pool = [name if turn == 0 else f"{name} {turn + 1}" for turn in range(rounds) for name in names]
    return rng.sample(pool, count)


def draw_numbers(digits: int, count: int, rng: random.Random) -> list[str]:
    """`count` different numbers of `digits` digits, none beginning with 0."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
