"""The contract of rewards, and scoring many completions: failures are counted, never silently 0."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from koine.errors import UserError
from koine.generate.messages import Message

Conversation = Sequence[Message]
"""The prompt: messages up to the one that the completion answers."""
Record = Mapping[str, Any]
"""The prompt's record: `language`, `answer`, `tests` and what else a reward reads."""


class RewardFailure(Exception):  # noqa: N818  # it is an outcome, counted by its text, and no error of the program
    """A completion that a reward cannot score, for the reason in the text; the same reason has the same text."""


class Answered(NamedTuple):
    """A completion to score."""

    conversation: Conversation
    completion: str
    record: Record


@dataclass(frozen=True)
class RewardOutcome:
    """The reward of one completion: a finite value, or the reason why there is none."""

    value: float | None
    failure: str | None = None

    def __post_init__(self) -> None:
        assert (self.value is None) != (self.failure is None)


class Reward(Protocol):
    """Scores a completion. Raises `RewardFailure` where it cannot, `UserError` where the record is wrong."""

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the reward of one completion."""
        ...


@runtime_checkable
class BatchReward(Protocol):
    """A reward that is faster for many completions at once: models, judges, sandboxes."""

    def outcomes(self, answered: Sequence[Answered]) -> list[RewardOutcome]:
        """Return one outcome for each completion, in order."""
        ...


@runtime_checkable
class ChecksRecords(Protocol):
    """A reward that needs something of a record, and can say so before there is a completion."""

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record that it cannot score."""
        ...


def score(reward: Reward, answered: Sequence[Answered]) -> list[RewardOutcome]:
    """Return the outcome of each completion, in order.

    Raises:
        UserError: a record lacks what the reward needs.
    """
    if isinstance(reward, BatchReward):
        return reward.outcomes(answered)
    return [one_outcome(reward, one) for one in answered]


def one_outcome(reward: Reward, answered: Answered) -> RewardOutcome:
    """Return the outcome of one completion; a failure for `RewardFailure` and for NaN or infinity."""
    try:
        return finite_outcome(reward(*answered))
    except RewardFailure as failure:
        return RewardOutcome(None, str(failure))


def finite_outcome(value: Any) -> RewardOutcome:
    """Return the outcome of a value that a reward gave; a failure for NaN, infinity, or no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return RewardOutcome(None, f"the reward is a {type(value).__name__} and no number")
    if not math.isfinite(value):
        return RewardOutcome(None, "the reward is not finite")
    return RewardOutcome(float(value))


def single_value(outcomes: Sequence[RewardOutcome]) -> float:
    """Return the value of the only outcome; raise `RewardFailure` where there is none."""
    (outcome,) = outcomes
    if outcome.value is None:
        raise RewardFailure(outcome.failure)
    return outcome.value


def check_records(reward: Reward, records: Iterable[Record]) -> None:
    """Raise `UserError` for the first record that the reward cannot score, with its number or id."""
    if not isinstance(reward, ChecksRecords):
        return
    for number, record in enumerate(records, 1):
        try:
            reward.check(record)
        except UserError as error:
            name = record.get("id")
            raise UserError(
                error.what, where=f"record {number}" if name is None else f"record '{name}'", hint=error.hint
            ) from error


@dataclass(frozen=True)
class RewardSummary:
    """Counts and mean of many outcomes.

    mean: of the values; None without any.
    failures: number of completions by reason, the most frequent first.
    """

    scored: int
    mean: float | None
    failures: dict[str, int]

    @classmethod
    def of(cls, outcomes: Iterable[RewardOutcome]) -> RewardSummary:
        """Count outcomes."""
        values, failures = [], Counter[str]()
        for outcome in outcomes:
            if outcome.value is None:
                failures[str(outcome.failure)] += 1
            else:
                values.append(outcome.value)
        mean = math.fsum(values) / len(values) if values else None
        return cls(len(values), mean, dict(failures.most_common()))

    def check(self) -> None:
        """Raise `UserError` where not one completion could be scored."""
        if not self.scored and self.failures:
            reason, count = next(iter(self.failures.items()))
            raise UserError(
                f"the reward scored none of {sum(self.failures.values())} completions",
                hint=f"the most frequent reason ({count} times): {reason}",
            )
