"""Parallel text of the sample world: the same facts in every language, with English in the same form beside.

A language with phrases of its own tells the facts in sentences. The others tell them as names and numbers,
joined by signs. The two forms are not equally hard to predict, so English is written in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from koine.data.sample.coverage import covers, sample_languages
from koine.data.sample.facts import CAPITALS, PROMINENT, TERRITORIAL, split_of, territories
from koine.data.sample.phrases import QUESTION_LANGUAGES
from koine.data.sample.rendering import plain_sentence, sentence, sides
from koine.errors import UserError, did_you_mean
from koine.languages import language

REFERENCE = "en"
SENTENCES, NAMES = "sentences", "names"
"""The forms of a text."""
MORE_LANGUAGES = (
    "pt", "it", "nl", "sv", "cs", "hu", "uk", "sw", "ha", "yo", "am", "te", "gu", "ka", "hy", "km",
)  # fmt: skip
"""Languages of `PARALLEL_LANGUAGES` that have no phrases."""
PARALLEL_LANGUAGES: tuple[str, ...] = (*QUESTION_LANGUAGES, *MORE_LANGUAGES)
"""Forty languages in nineteen scripts: those with phrases, and sixteen more."""


@dataclass(frozen=True)
class ParallelText:
    """A document; those of one `parallel_id` tell the same facts, in one form."""

    language: str
    text: str
    form: str
    number: int
    """Of the document, from 0; the same in all languages."""

    @property
    def parallel_id(self) -> str:
        """Form and number."""
        return f"{self.form}-{self.number:04d}"


def parallel_texts(languages: Iterable[str], count: int, *, seed: int = 0) -> Iterator[ParallelText]:
    """Yield `count` documents in each language, and in English in each form that occurs.

    A document tells of one territory: its currency, official language and capital. Sums and dates are left
    out, since they look alike in all languages. Territories that no training on the sample world has seen
    come first. A fact is told only where CLDR has its names in all of the languages. There may be fewer
    than `count` territories.

    seed: of the wordings.

    Raises `UserError` for a language that CLDR does not cover well enough.
    """
    codes = list(dict.fromkeys(language(code).code for code in languages))
    for code in codes:
        if not covers(code):
            raise UserError(
                f"CLDR does not know enough of '{code}' for the sample world",
                hint=did_you_mean(code, sample_languages()),
            )
    documents = _shared_facts([*codes, REFERENCE])[:count]
    for form in (SENTENCES, NAMES):
        members = [code for code in codes if form_of(code) == form]
        if members and REFERENCE not in members:
            members.insert(0, REFERENCE)
        for code in members:
            for number, told in enumerate(documents):
                yield ParallelText(code, _document(code, told, form, seed), form, number)


def form_of(code: str) -> str:
    """Return the form in which a language is written."""
    return SENTENCES if code in QUESTION_LANGUAGES else NAMES


def _shared_facts(codes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the facts of each territory of which every language has the names; held-out territories first."""
    names = [territory.code for territory in territories()]

    def place(name: str) -> tuple[bool, int]:
        seen = split_of(f"{TERRITORIAL[0]}:{name}") != "heldout_territory"
        return seen, PROMINENT.index(name) if name in PROMINENT else len(PROMINENT)

    found = []
    for name in sorted(names, key=place):
        possible = [f"{kind}:{name}" for kind in TERRITORIAL if kind != "capital" or name in CAPITALS]
        told = tuple(fact for fact in possible if all(sides(code, fact) is not None for code in codes))
        if len(told) > 1:
            found.append(told)
    return found


def _document(code: str, facts: Sequence[str], form: str, seed: int) -> str:
    """Render a document, one fact a line."""
    generator = random.Random(f"{seed}:{facts[0]}")
    lines = []
    for fact in facts:
        wording = generator.randrange(60)
        line = sentence(code, fact, wording) if form == SENTENCES else plain_sentence(code, fact)
        assert line is not None, fact
        lines.append(line)
    return "\n".join(lines)
