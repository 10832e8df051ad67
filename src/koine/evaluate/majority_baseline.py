"""The majority baseline of question answering: one constant answer for each language and kind of question.

A kind of question is the `kind` of a record, such as `currency`. Its constant answer in a language is the
most frequent answer among the training questions of that language and kind. Where no training question is
known, it is the most frequent answer among the test questions themselves, which is the best that any constant
answer can do. Of equally frequent answers the first by code point is taken.

The baseline of a set of test questions is the share that these constant answers get right. A model that
answers fewer has not learnt more than what kind of answer is usual.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

TRAINING, TEST = "training questions", "test questions"


class Topic(NamedTuple):
    """Language and kind of a question; records without a `kind` are of the kind ""."""

    language: str
    kind: str


@dataclass(frozen=True)
class ConstantAnswers:
    """The constant answer of each topic.

    Attributes:
        answers: by topic; a topic without training and test questions has none.
        sources: `TRAINING` or `TEST`, by topic.
    """

    answers: Mapping[Topic, str]
    sources: Mapping[Topic, str]

    def is_right(self, topic: Topic, answer: str) -> bool:
        """Return whether the topic's constant answer is this right answer."""
        return self.answers.get(topic) == answer

    def source(self, topics: Iterable[Topic]) -> str:
        """Return where the constant answers of some topics come from, in words."""
        return " and ".join(sorted({self.sources[topic] for topic in topics}, reverse=True))


def constant_answers(
    training: Iterable[tuple[Topic, str]], test: Iterable[tuple[Topic, str]]
) -> ConstantAnswers:
    """Return the most frequent answer of each topic: among training questions, else among test questions.

    training, test: topic and right answer of each question; answers are compared as they are.
    """
    answers: dict[Topic, str] = {}
    sources: dict[Topic, str] = {}
    for name, questions in ((TEST, test), (TRAINING, training)):
        counts: dict[Topic, Counter[str]] = defaultdict(Counter)
        for topic, answer in questions:
            counts[topic][answer] += 1
        for topic, counted in counts.items():
            answers[topic] = min(counted, key=lambda answer: (-counted[answer], answer))
            sources[topic] = name
    return ConstantAnswers(answers, sources)
