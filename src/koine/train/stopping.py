"""Rules that end a training early, decided from its evaluations alone.

A rule is a pure function of the evaluations so far. They are stored in every checkpoint, so a killed run
decides the same after it resumes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from koine.errors import UserError
from koine.train.fingerprint import objective_identity
from koine.train.settings import TrainSettings

Evaluations = Sequence[Mapping[str, float]]
"""Figures of each evaluation so far, oldest first; `step` is the number of steps done."""


class StopRule(Protocol):
    """When training ends early. Write one as a frozen dataclass whose fields are its arguments."""

    def __call__(self, evaluations: Evaluations, /) -> str | None:
        """Return the reason to end after the last evaluation, in words; None: go on. It must be pure."""

    def identity(self) -> dict[str, Any]:
        """Return the arguments as JSON values: `koine.train.arguments_identity(self)`."""


@runtime_checkable
class ChoosesBest(StopRule, Protocol):
    """A rule that also knows which evaluation is the best; it does where `best_metric` is empty."""

    def best(self, evaluations: Evaluations, /) -> int:
        """Return the index of the best evaluation: the last one, or the one that was the best before it.

        Checkpoints of other evaluations may be gone.
        """


def stop_identity(
    stop: StopRule | None, evaluate: object | None, settings: TrainSettings
) -> dict[str, Any] | None:
    """Return what decides where a training with a stop rule ends, as JSON values; None without a rule.

    The interval of the evaluations is part of it, and the evaluation's own `identity()` where it has one.

    Raises:
        UserError: the rule has no identity, or nothing is evaluated.
    """
    if stop is None:
        return None
    if evaluate is None or not settings.evaluate_every:
        raise UserError(
            "a stop rule, and nothing is evaluated during training",
            hint="give an evaluation, and evaluate_every: the number of steps between two",
        )
    identity = {**objective_identity(stop, what="stop rule"), "evaluate_every": settings.evaluate_every}
    if hasattr(evaluate, "identity"):
        identity["evaluation"] = objective_identity(evaluate, what="evaluation")
    return identity


def best_of_rule(
    stop: ChoosesBest, evaluations: Evaluations, best: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return the best evaluation as the rule chooses it; `best` is the one before the last evaluation."""
    if best is not None and stop.best(evaluations) != len(evaluations) - 1:
        return best
    return {"step": int(evaluations[-1]["step"]), "metric": type(stop).__name__, "value": None}
