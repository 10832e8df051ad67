"""Write the sample world: documents, questions and code, with the same facts and splits in every language."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from koine.data.sample.code import code_records
from koine.data.sample.coverage import covers, sample_languages
from koine.data.sample.facts import (
    CURRENCIES,
    SCRIPTED,
    SPLITS,
    TERRITORIAL,
    UNITS,
    facts_in,
    is_asked,
    prominence,
    split_of,
    territories,
)
from koine.data.sample.phrases import QUESTION_LANGUAGES
from koine.data.sample.preferences import FLIPPED, PairSettings, preference_records, prompt_plans
from koine.data.sample.rendering import enumeration, names, quantities, question, sentence, wordings_of
from koine.errors import UserError, did_you_mean
from koine.fields import check_integer
from koine.files import atomic_directory, write_json
from koine.languages import language

HELD_OUT_DOCUMENTS = 0.1
"""Held-out documents, as a share of the training documents."""
TEST_QUESTIONS = 0.5
"""Test questions, as a share of the training questions."""
TEST_PREFERENCES = 0.1
"""Test pairs, as a share of the training pairs."""
# Kinds of facts in a document; a document has one of these, drawn uniformly.
TOPICS = (
    ("currency", "capital", "language"),
    ("currency", "capital", "language", "script"),
    ("month", "day", "date"),
    ("sum", "quantity"),
    ("quantity", "amount", "sum"),
)
# Weight of each kind among questions. Kinds with few facts get less, so that no fact is asked very often.
ASKED = {
    "currency": 4,
    "language": 4,
    "capital": 4,
    "script": 1,
    "month": 1,
    "day": 1,
    "sum": 3,
    "quantity": 3,
    "amount": 1,
    "date": 1,
}

DIALOGUES = 3
"""Dialogues of each language, per training question."""
LISTS = 0.25
"""Share of the training documents of sentences that hold a list."""


class DocumentPlan(NamedTuple):
    """A document before it has a language."""

    facts: tuple[str, ...]
    number: int
    """Seed of its list, its wordings and its line breaks."""


@dataclass(frozen=True)
class SampleSummary:
    """Counts of what was written, by language."""

    languages: dict[str, dict[str, int]]
    code: dict[str, int]

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings of `rows`."""
        return (
            *(
                "language",
                "name",
                "documents",
                "bytes",
                "held-out documents",
                "held-out bytes",
                "training questions",
            ),
            *(f"test: {split}" for split in SPLITS[1:]),
        )

    def rows(self) -> list[tuple[str | int, ...]]:
        """Return one row per language, and one for the code."""
        keys = ("documents", "bytes", "heldout_documents", "heldout_bytes", "questions", *SPLITS[1:])
        rows: list[tuple[str | int, ...]] = [
            (code, language(code).name, *(counts[key] for key in keys))
            for code, counts in self.languages.items()
        ]
        if self.code["documents"]:
            rows.append(("code", "Python", self.code["documents"], self.code["bytes"], *[0] * 6))
        return rows


def dialogue_wordings(kind: str) -> range:
    """Return the wordings that dialogues use of a kind of question: every second one.

    Recall is tested in the other ones.
    """
    return range(0, wordings_of(kind), 2)


def question_wordings(kind: str, split: str) -> range:
    """Return the wordings of the questions of a split; those of `recall` are in no dialogue."""
    return range(1, wordings_of(kind), 2) if split == "recall" else range(wordings_of(kind))


def document_plans(count: int, *, seed: int, heldout: bool) -> list[DocumentPlan]:
    """Choose the facts of each document; the same for every language.

    Held-out documents hold only held-out facts; training documents hold none.
    """
    everything = _pool(("heldout_fact", "heldout_territory") if heldout else ("train", "recall"))
    generator = random.Random(f"{seed}:{'heldout' if heldout else 'train'}")
    plans = []
    topics = [topic for topic in TOPICS if any(everything[kind] for kind in topic)]
    for _ in range(count):
        kinds = [kind for kind in generator.choice(topics) if everything[kind]]
        chosen: list[str] = []
        for _ in range(generator.randint(3, 6)):
            drawn = everything[generator.choice(kinds)]
            chosen += generator.choices(drawn, [prominence(fact) for fact in drawn])
        if set(kinds) >= set(TERRITORIAL):
            # A document holds all facts of a territory together.
            chosen = [fact for name in chosen for fact in _beside(name, everything)]
        plans.append(DocumentPlan(tuple(dict.fromkeys(chosen)), generator.randrange(2**30)))
    return plans


def dialogue_plans(count: int, *, seed: int) -> list[DocumentPlan]:
    """Choose the facts of each dialogue, one to four; the same for every language."""
    pool = {kind: tuple(filter(is_asked, names)) for kind, names in _pool(("train", "recall")).items()}
    generator = random.Random(f"{seed}:dialogues")
    kinds = [kind for kind in ASKED if pool[kind]]
    plans = []
    for _ in range(count):
        chosen = []
        for kind in generator.choices(kinds, [ASKED[kind] for kind in kinds], k=generator.randint(1, 4)):
            chosen += generator.choices(pool[kind], [prominence(fact) for fact in pool[kind]])
        plans.append(DocumentPlan(tuple(dict.fromkeys(chosen)), generator.randrange(2**30)))
    return plans


def _pool(splits: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the facts of some splits, by kind."""
    parts = [facts_in(split) for split in splits]
    return {kind: tuple(fact for part in parts for fact in part[kind]) for kind in parts[0]}


def _beside(fact: str, pool: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the facts in `pool` about the same territory."""
    kind, _, code = fact.partition(":")
    if kind not in TERRITORIAL:
        return [fact]
    return [f"{other}:{code}" for other in TERRITORIAL if f"{other}:{code}" in pool[other]]


def _document(code: str, plan: DocumentPlan, *, heldout: bool) -> str:
    """Render the text of a document."""
    generator = random.Random(plan.number)
    told = [sentence(code, fact, generator.randrange(60)) for fact in plan.facts]
    lines = [line for line in told if line is not None]
    if not heldout and generator.random() < LISTS:
        lines.insert(generator.randrange(len(lines) + 1), _list(code, generator))
    return ("\n" if generator.random() < 0.5 else " ").join(lines)


def _list(code: str, generator: random.Random) -> str:
    """Return a sentence that lists names, or a unit with the plural forms of several numbers."""
    kind = generator.choice(("languages", "scripts", "currencies", "units"))
    if kind == "units":
        numbers = sorted(generator.sample(range(1, 32), 4))
        return enumeration(code, quantities(code, generator.choice(UNITS), numbers))
    keys = {
        "languages": sorted(SCRIPTED),
        "scripts": sorted(set(SCRIPTED.values())),
        # A currency's name may name a territory ("Kenyan Shilling"); its code begins with the territory's.
        "currencies": sorted(
            currency
            for currency in {*CURRENCIES, *(territory.currency for territory in territories())}
            if split_of(f"currency:{currency[:2]}") != "heldout_territory"
        ),
    }[kind]
    return enumeration(code, names(code, kind, generator.sample(keys, 4)) or ["1", "2", "3"])


def _records(code: str, plans: Sequence[DocumentPlan], *, heldout: bool) -> Iterator[dict[str, Any]]:
    part = "heldout" if heldout else "train"
    for number, plan in enumerate(plans):
        yield {
            "id": f"sample-{part}-{number:06d}-{code}",
            "text": _document(code, plan, heldout=heldout),
            "language": code,
            "domain": "sample",
            "source": "cldr",
            "split": part,
            "facts": list(plan.facts),
        }


def _dialogues(code: str, plans: Sequence[DocumentPlan]) -> Iterator[dict[str, Any]]:
    """Yield conversations that ask for the facts of each plan."""
    for number, plan in enumerate(plans):
        generator = random.Random(plan.number)
        turns = [
            question(code, fact, generator.choice(dialogue_wordings(fact.partition(":")[0])))
            for fact in plan.facts
        ]
        messages = [
            {"role": role, "content": content}
            for turn in turns
            if turn is not None
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        if messages:
            yield {
                "id": f"dialogue-{number:06d}-{code}",
                "messages": messages,
                "language": code,
                "domain": "dialogues",
                "source": "cldr",
                "split": "train",
                "facts": list(plan.facts),
            }


def broad_texts(count: int) -> list[str]:
    """Return `count` short documents in each language of the sample world.

    General text for measures that need many languages.
    """
    from koine.data.sample.coverage import sample_languages

    plans = document_plans(count, seed=0, heldout=False)
    return [record["text"] for code in sample_languages() for record in _records(code, plans, heldout=False)]


def question_plans(count: int, splits: Sequence[str], *, seed: int) -> list[tuple[str, str, int]]:
    """Choose fact, split and wording of each question; the same for every language.

    Each (fact, wording) is chosen at most once.
    """
    generator = random.Random(f"{seed}:questions:{','.join(splits)}")
    per_split = max(1, count // len(splits))
    chosen: list[tuple[str, str, int]] = []
    for split in splits:
        asked = {kind: tuple(filter(is_asked, found)) for kind, found in facts_in(split).items()}
        weighted = [
            (
                generator.random() ** (1.0 / (ASKED[kind] * prominence(fact) / sum(map(prominence, found)))),
                fact,
                wording,
            )
            for kind, found in asked.items()
            for fact in found
            for wording in question_wordings(kind, split)
        ]
        weighted.sort(reverse=True)
        chosen += [(fact, split, wording) for _, fact, wording in weighted[:per_split]]
    generator.shuffle(chosen)
    return chosen


def _questions(code: str, plans: Sequence[tuple[str, str, int]]) -> Iterator[dict[str, Any]]:
    for number, (fact, split, wording) in enumerate(plans):
        found = question(code, fact, wording)
        if found is None:
            continue
        yield {
            "id": f"question-{'train' if split == 'train' else 'test'}-{number:06d}-{code}",
            "messages": [{"role": "user", "content": found[0]}, {"role": "assistant", "content": found[1]}],
            "answer": found[1],
            "language": code,
            "domain": "questions",
            "source": "cldr",
            "split": split,
            "kind": fact.partition(":")[0],
            "fact": fact,
        }


def heldout_count(documents_per_language: int) -> int:
    """Return the number of held-out documents of each language."""
    return max(4, round(HELD_OUT_DOCUMENTS * documents_per_language))


def write_sample(
    languages: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    documents_per_language: int = 600,
    questions_per_language: int = 600,
    code_bytes: int = 300_000,
    preferences_per_language: int = 0,
    flipped: float = FLIPPED,
    overwrite: bool = False,
) -> SampleSummary:
    """Write the sample world in `languages` into the new folder `out`; equal arguments give equal bytes.

    `documents/`, `documents-heldout/`, `questions/train/` and `questions/test/` hold one JSON Lines file per
    language (questions for those of `QUESTION_LANGUAGES`). `code.jsonl` is the code domain, `summary.json`
    the counts. With `preferences_per_language`, `preferences/train/` and `preferences/test/` hold pairs of
    answers (`koine.data.sample.preferences`), a tenth of them for tests, which ask other questions.

    flipped: share of the pairs with the wrong label.

    Raises `UserError` for a language that CLDR does not cover well enough, and if `out` is not empty (unless
    `overwrite`).
    """
    codes = [language(code).code for code in languages]
    for code in codes:
        if not covers(code):
            raise UserError(
                f"CLDR does not know enough of '{code}' for the sample world",
                hint=did_you_mean(code, sample_languages()),
            )
    for name, value in (
        ("documents_per_language", documents_per_language),
        ("questions_per_language", questions_per_language),
    ):
        check_integer(name, value, low=1)
    check_integer("preferences_per_language", preferences_per_language, low=0)
    plans = document_plans(documents_per_language, seed=seed, heldout=False)
    heldout = document_plans(heldout_count(documents_per_language), seed=seed, heldout=True)
    asked = question_plans(questions_per_language, ("train",), seed=seed)
    tested = question_plans(max(3, round(TEST_QUESTIONS * questions_per_language)), SPLITS[1:], seed=seed)
    talks = dialogue_plans(DIALOGUES * questions_per_language, seed=seed)
    summary = SampleSummary({}, {"documents": 0, "bytes": 0})
    with atomic_directory(out, overwrite=overwrite) as folder:
        for code in codes:
            counts = _write_documents(folder, code, plans, heldout)
            if code in QUESTION_LANGUAGES:
                counts |= _write_questions(folder, code, asked, tested)
                _write(folder / "dialogues" / f"{code}.jsonl", _dialogues(code, talks))
                if preferences_per_language:
                    _write_preferences(folder, code, codes, preferences_per_language, flipped, seed)
            summary.languages[code] = counts
        if code_bytes:
            summary.code["documents"], summary.code["bytes"] = _write(
                folder / "code.jsonl", code_records(code_bytes)
            )
        write_json(
            folder / "summary.json", {"seed": seed, "languages": summary.languages, "code": summary.code}
        )
    return summary


def _write_documents(
    folder: Path, code: str, plans: Sequence[DocumentPlan], heldout: Sequence[DocumentPlan]
) -> dict[str, int]:
    """Write the documents of a language; return its counts, those of questions being 0."""
    counts = dict.fromkeys(("heldout_documents", "heldout_bytes", "questions", *SPLITS[1:]), 0)
    counts["documents"], counts["bytes"] = _write(
        folder / "documents" / f"{code}.jsonl", _records(code, plans, heldout=False)
    )
    counts["heldout_documents"], counts["heldout_bytes"] = _write(
        folder / "documents-heldout" / f"{code}.jsonl", _records(code, heldout, heldout=True)
    )
    return counts


def _write_questions(
    folder: Path,
    code: str,
    asked: Sequence[tuple[str, str, int]],
    tested: Sequence[tuple[str, str, int]],
) -> dict[str, int]:
    """Write the training and test questions of a language; return their counts."""
    counts = dict.fromkeys(SPLITS[1:], 0)
    counts["questions"], _ = _write(folder / "questions" / "train" / f"{code}.jsonl", _questions(code, asked))
    test = list(_questions(code, tested))
    _write(folder / "questions" / "test" / f"{code}.jsonl", iter(test))
    for record in test:
        counts[record["split"]] += 1
    return counts


def _write_preferences(
    folder: Path, code: str, codes: Sequence[str], count: int, flipped: float, seed: int
) -> None:
    """Write the training and test pairs of a language."""
    settings = PairSettings(flipped=flipped)
    languages = [one for one in codes if one in QUESTION_LANGUAGES]
    for part, number in (("train", count), ("test", max(4, round(TEST_PREFERENCES * count)))):
        asked = prompt_plans(number, seed=seed, heldout=part == "test")
        records = preference_records(code, asked, settings=settings, languages=languages, part=part)
        _write(folder / "preferences" / part / f"{code}.jsonl", records)


def _write(path: Path, records: Iterator[dict[str, Any]]) -> tuple[int, int]:
    """Write JSON Lines; return the number of records and the bytes of their text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = size = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            count += 1
            size += len(record.get("text", "").encode("utf-8"))
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count, size
