"""Evaluations during training, and which of them is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from koine.errors import UserError, did_you_mean
from koine.model.language_model import LanguageModel


def run_evaluation(
    evaluate: Callable[[LanguageModel, int], Mapping[str, float]], model: LanguageModel, steps_done: int
) -> dict[str, float]:
    """Return the figures of an evaluation, without a change to the training's random state."""
    model.eval()
    with torch.no_grad(), torch.random.fork_rng():
        figures = dict(evaluate(model, steps_done))
    model.train()
    return figures


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
