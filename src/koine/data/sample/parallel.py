"""Parallel text of the sample world: the same facts in every language, with English in the same form beside.

A language with phrases of its own tells the facts in sentences. The others tell them as names and numbers,
joined by signs. The two forms are not equally hard to predict, so English is written in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from koine.data.sample.coverage import covers, sample_languages
from koine.data.sample.phrases import QUESTION_LANGUAGES
from koine.data.sample.rendering import plain_sentence, sentence, sides
from koine.data.sample.world import DocumentPlan, document_plans
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
WITHOUT_LANGUAGE = ("sum",)
"""Kinds of facts that are digits alone, the same in most languages."""
MOST_FACTS = 4
"""Facts of a document: more documents give better intervals than longer ones."""


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

    The facts are held-out ones, which no training on the sample world has seen. A fact is told only where
    CLDR has its names in all of the languages.

    Raises `UserError` for a language that CLDR does not cover well enough.
    """
    codes = list(dict.fromkeys(language(code).code for code in languages))
    for code in codes:
        if not covers(code):
            raise UserError(
                f"CLDR does not know enough of '{code}' for the sample world",
                hint=did_you_mean(code, sample_languages()),
            )
    plans = _shared_plans([*codes, REFERENCE], count, seed=seed)
    for form in (SENTENCES, NAMES):
        members = [code for code in codes if form_of(code) == form]
        if members and REFERENCE not in members:
            members.insert(0, REFERENCE)
        for code in members:
            for number, plan in enumerate(plans):
                yield ParallelText(code, _document(code, plan, form), form, number)


def form_of(code: str) -> str:
    """Return the form in which a language is written."""
    return SENTENCES if code in QUESTION_LANGUAGES else NAMES


def _shared_plans(codes: Sequence[str], count: int, *, seed: int) -> list[DocumentPlan]:
    """Return `count` plans of documents with the facts that every language has the names of."""
    found: list[DocumentPlan] = []
    # About a fifth of the plans are of sums alone, and drop out.
    for plan in document_plans(2 * count + 20, seed=seed, heldout=True):
        facts = tuple(
            fact
            for fact in plan.facts
            if fact.partition(":")[0] not in WITHOUT_LANGUAGE
            and all(sides(code, fact) is not None for code in codes)
        )
        if len(facts) > 1:
            found.append(plan._replace(facts=facts[:MOST_FACTS]))
    return found[:count]


def _document(code: str, plan: DocumentPlan, form: str) -> str:
    """Render a document, one fact a line."""
    generator = random.Random(plan.number)
    lines = []
    for fact in plan.facts:
        wording = generator.randrange(60)
        line = sentence(code, fact, wording) if form == SENTENCES else plain_sentence(code, fact)
        assert line is not None, fact
        lines.append(line)
    return "\n".join(lines)
