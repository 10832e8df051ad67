"""Rules that stop a preference training, and `--stop-on`, which names one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koine.align.behaviour import direction
from koine.align.overoptimisation import DEFAULT, NEEDED, Constants, best_evaluation, verdict
from koine.errors import UserError, did_you_mean
from koine.train.fingerprint import arguments_identity
from koine.train.stopping import StopRule

OVEROPTIMISATION = "overoptimisation"
PATIENCE = 2
"""Evaluations without a better value after which `StopWithoutImprovement` stops."""

Evaluations = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class StopOnOveroptimisation:
    """Stop where `koine.align.overoptimisation.verdict` says so; the best is the last evaluation without a sign."""

    constants: Constants = DEFAULT

    def __call__(self, evaluations: Evaluations, /) -> str | None:
        """Return the verdict in words; None where nothing is over-optimised."""
        for name in NEEDED:
            _value(evaluations[-1], name)
        found = verdict(evaluations, self.constants)
        return found.text if found.state == "over-optimised" else None

    def best(self, evaluations: Evaluations, /) -> int:
        """Return the index of the last evaluation without a sign."""
        return best_evaluation(evaluations, self.constants)

    def identity(self) -> dict[str, Any]:
        """Return the constants."""
        return arguments_identity(self)


@dataclass(frozen=True)
class StopAtLimit:
    """Stop where a metric reaches a limit from below, as the KL to the reference may."""

    metric: str
    limit: float

    def __call__(self, evaluations: Evaluations, /) -> str | None:
        """Return the value and the limit; None below it."""
        value = _value(evaluations[-1], self.metric)
        return f"{self.metric} is {value:.4g}, and the limit {self.limit:g}" if value >= self.limit else None

    def best(self, evaluations: Evaluations, /) -> int:
        """Return the index of the last evaluation below the limit; the first one where none is."""
        below = [index for index, one in enumerate(evaluations) if _value(one, self.metric) < self.limit]
        return below[-1] if below else 0

    def identity(self) -> dict[str, Any]:
        """Return metric and limit."""
        return arguments_identity(self)


@dataclass(frozen=True)
class StopWithoutImprovement:
    """Stop where a metric has had no better value for some evaluations (early stopping).

    metric: lower is better, unless the metric is known to be better where it is higher (`accuracy`, rewards).
        `-NAME`: higher is better.
    patience: evaluations in a row without a better value than before them.
    """

    metric: str
    patience: int = PATIENCE

    @property
    def name(self) -> str:
        """Name of the metric, without its sign."""
        return self.metric.removeprefix("-")

    def best(self, evaluations: Evaluations, /) -> int:
        """Return the index of the best value, the first of equals."""
        higher = self.metric.startswith("-") or direction(self.name) > 0
        values = [_value(one, self.name) * (-1 if higher else 1) for one in evaluations]
        return values.index(min(values))

    def __call__(self, evaluations: Evaluations, /) -> str | None:
        """Return the best value and how long ago it was; None where it is recent."""
        best = self.best(evaluations)
        if len(evaluations) - 1 - best < self.patience:
            return None
        step, value = int(evaluations[best]["step"]), evaluations[best][self.name]
        return f"{self.name} was best at step {step:,} ({value:.4g}), {self.patience} evaluations ago"

    def identity(self) -> dict[str, Any]:
        """Return metric and patience."""
        return arguments_identity(self)


def _value(evaluation: Mapping[str, float], name: str) -> float:
    if name not in evaluation:
        raise UserError(f"the evaluation has no metric '{name}'", hint=did_you_mean(name, evaluation))
    return evaluation[name]


def parse_stop_rule(text: str, measured: Collection[str]) -> StopRule:
    """Return the rule that `--stop-on` names.

    Args:
        text: `overoptimisation`; `METRIC=LIMIT`, such as `kl=0.5`; or `METRIC`, which stops without improvement.
        measured: names of the metrics that the evaluation will have.

    Raises:
        UserError: the text is none of these, or its metric is not measured.
    """
    where = f"--stop-on {text}"
    if text == OVEROPTIMISATION:
        missing = [name for name in NEEDED if name not in measured]
        if missing:
            raise UserError(
                f"{', '.join(missing)} are not measured",
                where=where,
                hint="the rule needs samples of the model: give prompts to the monitor of `koine align train`",
            )
        return StopOnOveroptimisation()
    metric, equals, limit = text.partition("=")
    name = metric.removeprefix("-")
    if name not in measured:
        raise UserError(
            f"the metric '{name}' is not measured",
            where=where,
            hint=did_you_mean(name, [*measured, *([OVEROPTIMISATION] if {*NEEDED} <= {*measured} else [])]),
        )
    if not equals:
        return StopWithoutImprovement(metric)
    try:
        number = float(limit)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or metric != name:
        raise UserError(
            f"'{limit if metric == name else metric}' is no {'limit' if metric == name else 'metric'}",
            where=where,
            hint="give METRIC=LIMIT with a number, such as kl=0.5",
        )
    return StopAtLimit(name, number)
