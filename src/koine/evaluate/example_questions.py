"""Example questions: what a model was asked in an evaluation and answered right, for people to try.

`example_questions.json` in a model's folder holds them; other programs ignore it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.fields import Fields
from koine.files import read_json_object, write_json
from koine.languages import LANGUAGES

if TYPE_CHECKING:
    from koine.model import Decoder
    from koine.tokenizer import Tokenizer

FILE = "example_questions.json"
SURE = 0.8
"""Probability of an answer from which sampling at the chat's temperature hardly ever gives another."""
CANDIDATES = 12
"""Questions of each language among which examples are chosen."""


@dataclass(frozen=True)
class Example:
    """A question of one message, and the model's right answer.

    kind: what it asks for, as the data name it. probability: of the whole answer, by the model.
    """

    question: str
    answer: str
    language: str
    kind: str
    probability: float = 0.0

    @property
    def is_sentence(self) -> bool:
        """Whether it reads like something that a person asks: no sum and no form with a colon."""
        return not any(letter.isdigit() or letter in ":：" for letter in self.question)


@dataclass(frozen=True)
class Examples:
    """Example questions, and how many of all questions were answered right."""

    asked: int
    right: int
    examples: tuple[Example, ...]

    def save(self, folder: Path) -> None:
        """Write them into a folder."""
        write_json(folder / FILE, asdict(self))


def read_examples(folder: Path) -> Examples | None:
    """Return the examples of a folder; None where it has none.

    Raises `UserError` for a damaged file.
    """
    path = folder / FILE
    if not path.exists():
        return None
    fields = Fields(read_json_object(path), str(path))
    examples = []
    for entry in fields.entries("examples"):
        one = Fields(entry, f"{path}: an example")
        examples.append(
            Example(
                question=one.text("question"),
                answer=one.text("answer"),
                language=one.text("language"),
                kind=one.text("kind"),
                probability=one.number("probability"),
            )
        )
    return Examples(fields.integer("asked", low=0), fields.integer("right", low=0), tuple(examples))


def example_of(record: Mapping[str, Any], answer: str) -> Example | None:
    """Return a question and its answer; None where it has a system prompt or several turns."""
    messages = [message for message in record["messages"] if message["role"] != "assistant"]
    if len(messages) != 1 or messages[0]["role"] != "user":
        return None
    return Example(
        question=" ".join(str(messages[0]["content"]).split()),
        answer=" ".join(answer.split()),
        language=str(record.get("language") or "und"),
        kind=str(record.get("kind") or ""),
    )


def candidates(found: Iterable[Example], most: int = CANDIDATES) -> list[Example]:
    """Return at most `most` examples of each language: sentences first, kinds in turn."""
    by_language: dict[str, list[Example]] = {}
    counts: dict[tuple[str, str], int] = {}
    ranked = []
    for one in found:
        turn = counts[one.language, one.kind] = counts.get((one.language, one.kind), 0) + 1
        ranked.append((not one.is_sentence, turn, one))
    for _, _, one in sorted(ranked, key=lambda entry: entry[:2]):
        by_language.setdefault(one.language, []).append(one)
    return [one for some in by_language.values() for one in some[:most]]


def with_probabilities(
    examples: Sequence[Example], model: Decoder, tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> list[Example]:
    """Return the examples with the probability of the greedy answer; those answered otherwise are left out."""
    from koine.generate import generate
    from koine.generate.sampling import Sampling

    if not examples:
        return []
    prompts = [
        tokenizer.encode_messages([{"role": "user", "content": one.question}], generation_prompt=True)[0]
        for one in examples
    ]
    longest = max(len(tokenizer.encode(one.answer)) for one in examples)
    sampling = Sampling(max_new_tokens=2 * longest + 8, temperature=0)
    found = []
    for one, request in zip(examples, generate(model, prompts, sampling, stop_ids=stop_ids), strict=True):
        if request.finish == "stop" and " ".join(tokenizer.decode(request.tokens[:-1]).split()) == one.answer:
            found.append(replace(one, probability=math.exp(sum(request.log_probabilities))))
    return found


def choose(examples: Sequence[Example], codes: Sequence[str], count: int) -> tuple[Example, ...]:
    """Choose examples one by one: sure answers, sentences, and different from those chosen before.

    codes: languages; of equals, an example in one that comes earlier is chosen.
    """
    order = {code: place / len(codes) for place, code in enumerate(codes)}
    left, chosen = list(examples), list[Example]()

    def score(one: Example) -> float:
        return (
            2.0 * min(one.probability / SURE, 1.0)
            + 1.5 * one.is_sentence
            + 2.0 * all(one.language != other.language for other in chosen)
            + 1.0 * all(one.kind != other.kind for other in chosen)
            + 1.0 * all(one.answer != other.answer for other in chosen)
            + 0.5 * all(cluster_of(one.language) != cluster_of(other.language) for other in chosen)
            - 0.9 * order.get(one.language, 1.0)
        )

    while left and len(chosen) < count:
        best = max(left, key=score)
        left.remove(best)
        chosen.append(best)
    return tuple(chosen)


def cluster_of(code: str) -> str:
    """Return the cluster of a language; "none" for one that is not in the table."""
    return LANGUAGES[code].cluster if code in LANGUAGES else "none"
