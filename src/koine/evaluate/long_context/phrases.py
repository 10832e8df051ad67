"""Phrases of needles, questions and answers by language, from `phrases.tsv` (a row a language).

Inserted words are never inflected. The sentence of the answer (`fact`, `facts`, `variables`, `words`) begins
with the same words as the needle, so a base model can complete it. No question (`ask...`) contains these
words: their nearest place must be the needle. The row `und` has signs only and serves any language.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Phrases:
    """Phrases of a language, with slots `{key}`, `{keys}`, `{value}`, `{values}`, `{names}`, `{x}`."""

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
        """Return keys in the language's quotation marks, with its commas between."""
        return self.comma.join(self.quoted.replace("{x}", key) for key in keys)

    def join(self, values: Sequence[str]) -> str:
        """Return values with the language's commas between."""
        return self.comma.join(values)


def lead_and_answer(sentence: str, slot: str, value: str) -> tuple[str, str]:
    """Split a sentence at its `slot` into lead and answer: `("The number is", " 7")`.

    The space belongs to the answer.
    """
    before, _, _ = sentence.partition(slot)
    lead = before.rstrip(" ")
    return lead, before[len(lead) :] + value


@functools.cache
def _all_phrases() -> dict[str, Phrases]:
    text = resources.files("koine.evaluate.long_context").joinpath("phrases.tsv").read_text(encoding="utf-8")
    return {row[0]: Phrases(*row) for row in (line.split("\t") for line in text.splitlines()[1:])}


def phrase_languages() -> tuple[str, ...]:
    """Return the languages with phrases of their own, `und` among them."""
    return tuple(_all_phrases())


def phrases_of(language: str) -> Phrases:
    """Return the phrases of a language (`pt-BR`: those of `pt`), or the neutral ones."""
    found = _all_phrases()
    return found.get(language) or found.get(language.split("-")[0]) or found["und"]


@functools.cache
def key_names(language: str) -> tuple[str, ...]:
    """Return names for keys: CLDR's territories in the language, or in English."""
    from koine.data.sample.coverage import sample_languages
    from koine.data.sample.facts import territories
    from koine.data.sample.rendering import names

    known = sample_languages()
    code = next((one for one in (language, language.split("-")[0]) if one in known), "en")
    return tuple(dict.fromkeys(names(code, "territories", [one.code for one in territories()])))


def draw_keys(language: str, count: int, rng: random.Random) -> list[str]:
    """Draw `count` different keys; where the names do not suffice, they get numbers."""
    names = key_names(language)
    rounds = -(-count // len(names))
    pool = [name if turn == 0 else f"{name} {turn + 1}" for turn in range(rounds) for name in names]
    return rng.sample(pool, count)


def draw_numbers(digits: int, count: int, rng: random.Random) -> list[str]:
    """Draw `count` different numbers of `digits` digits, none beginning with 0."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
