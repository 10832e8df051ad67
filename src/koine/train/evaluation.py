"""Evaluations during training, and which of them is the best."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch

from koine.errors import UserError, did_you_mean
from koine.model.language_model import LanguageModel


class NamedEvaluation(Protocol):
    """An `evaluate` of `koine.train.train` that knows its figures before the training."""

    @property
    def names(self) -> list[str]:
        """Names of the figures that it measures."""

    def __call__(self, model: LanguageModel, steps_done: int, /) -> Mapping[str, float]:
        """Return the figures of a model after some steps."""

    def identity(self) -> dict[str, Any]:
        """Return all that determines the figures of a given model, as JSON values."""


def run_evaluation(
    evaluate: Callable[[LanguageModel, int], Mapping[str, float]], model: LanguageModel, steps_done: int
) -> dict[str, float]:
    """Return the figures of an evaluation, without a change to the training's random state."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        figures = dict(evaluate(model, steps_done))
    model.train()
    return figures


class JoinedEvaluations:
    """Several evaluations as one `evaluate`: their figures one after another.

    Each has `names`, the figures that it measures, and `identity()`.
    """

    def __init__(self, evaluations: Sequence[NamedEvaluation]) -> None:
        self.evaluations = tuple(evaluations)

    @property
    def names(self) -> list[str]:
        """Names of the figures of all."""
        return [name for one in self.evaluations for name in one.names]

    def __call__(self, model: LanguageModel, steps_done: int) -> dict[str, float]:
        return {name: value for one in self.evaluations for name, value in one(model, steps_done).items()}

    def identity(self) -> dict[str, Any]:
        """Return the identity of each, by its class."""
        return {type(one).__name__: one.identity() for one in self.evaluations}


def check_metric(name: str, names: Collection[str]) -> None:
    """Raise `UserError` for a metric that is not measured; "" is the first one, `-NAME` the highest of NAME."""
    if name and name.removeprefix("-") not in names:
        raise UserError(f"the evaluation has no metric '{name}'", hint=did_you_mean(name, names))


def better_evaluation(
    best: dict[str, Any] | None, figures: Mapping[str, float], steps_done: int, metric: str
) -> dict[str, Any] | None:
    """Return the best evaluation so far: the lowest `metric`, or first figure where that is empty.

    `-NAME` is the highest value of the metric NAME.

    Raises `UserError` for a metric that the evaluation does not have.
    """
    if not figures:
        return best
    given = metric or next(iter(figures))
    name, sign = (given[1:], -1) if given.startswith("-") else (given, 1)
    if name not in figures:
        raise UserError(f"the evaluation has no metric '{name}'", hint=did_you_mean(name, figures))
    if best is None or sign * figures[name] < sign * best["value"]:
        return {"step": steps_done, "metric": given, "value": figures[name]}
    return best
