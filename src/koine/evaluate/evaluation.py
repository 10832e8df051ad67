"""The definition of an evaluation: a function from a model and records to results, and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from koine.model import LanguageModel
    from koine.tokenizer import Tokenizer

Block = dict[str, Any]
"""A block of a report; see `koine.plan.report.blocks`."""
OnAnswer = Callable[[Mapping[str, Any], str | None, bool], None]
"""Gets a question as it was given, the model's answer (None where it did not end), and whether it is right."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSetup:
    """A model with its tokenizer, and the settings that evaluations share.

    Attributes:
        batch_size: documents or questions at a time; results do not depend on it.
        max_length: tokens of a window; `None`: as many as the model's configuration allows.
        seed: of the bootstrap intervals.
        on_answer: is called with the answer to each question.
        training_questions: questions that the model was trained on, for the majority baseline.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    batch_size: int = 16
    max_length: int | None = None
    device: str = "cpu"
    seed: int = 0
    on_answer: OnAnswer | None = None
    training_questions: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An entry of `koine.evaluate.table.EVALUATIONS`.

    Attributes:
        title: of its section in a report.
        reads: which records it takes: `documents` (`--data`) or `questions` (`--questions`).
        measure: returns the entries that it adds to the results, as JSON.
        blocks: report blocks made from the results; none where they lack its entries.
        applies: whether a model can be evaluated so.
    """

    title: str
    reads: Literal["documents", "questions"]
    measure: Callable[[EvaluationSetup, Iterable[Mapping[str, Any]]], dict[str, Any]]
    blocks: Callable[[Mapping[str, Any]], list[Block]]
    applies: Callable[[LanguageModel], bool] = lambda _: True


def format_interval(interval: list[float] | None, digits: int) -> str:
    """Format an interval for a table."""
    return "–" if interval is None else f"{interval[0]:.{digits}f} – {interval[1]:.{digits}f}"
