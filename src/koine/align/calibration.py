"""Measure the over-optimisation rule on finished runs whose gold reward is known at every evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from koine.align.overoptimisation import Calibration, Constants, best_evaluation, verdict
from koine.errors import UserError


@dataclass(frozen=True)
class GoldRun:
    """A run that nothing stopped: its evaluations, and the gold reward at each (higher is better)."""

    evaluations: tuple[Mapping[str, float], ...]
    gold: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.evaluations) != len(self.gold) or not self.gold:
            raise UserError(
                f"{len(self.gold)} gold rewards for {len(self.evaluations)} evaluations",
                hint="give the gold reward of each evaluation, at least one",
            )

    def harmed_at(self, loss: float) -> int | None:
        """Return the steps at which the gold reward has fallen by `loss` from its peak; None: it never does."""
        peak = max(range(len(self.gold)), key=self.gold.__getitem__)
        for index in range(peak, len(self.gold)):
            if self.gold[peak] - self.gold[index] >= loss:
                return int(self.evaluations[index]["step"])
        return None


def measure_rule(runs: Iterable[GoldRun], constants: Constants, *, loss: float) -> Calibration:
    """Measure detections, false alarms, lead and regret of the rule.

    Args:
        runs: finished runs on which the constants were not chosen.
        constants: of the rule.
        loss: fall of the gold reward from its peak from which a run counts as over-optimised.
    """
    detected = false_alarms = harmed = other = 0
    leads: list[float] = []
    regrets: list[float] = []
    for run in runs:
        at, stop = run.harmed_at(loss), verdict(run.evaluations, constants).step
        kept = best_evaluation(run.evaluations, constants)
        regrets.append(max(run.gold) - run.gold[kept])
        harmed, other = harmed + (at is not None), other + (at is None)
        if stop is not None and at is not None:
            detected += 1
            leads.append(at - stop)
        elif stop is not None:
            false_alarms += 1
    if not regrets:
        raise UserError("no run to measure the rule on", hint="give at least one finished run")
    return Calibration(
        over_optimised=harmed,
        detected=detected,
        other=other,
        false_alarms=false_alarms,
        lead=median(leads) if leads else None,
        regret=fmean(regrets),
    )


def choose_constants(runs: Sequence[GoldRun], candidates: Iterable[Constants], *, loss: float) -> Constants:
    """Return the candidate with the least regret on `runs`, then the fewest false alarms; the first of equals.

    The result has no calibration: measure that on other runs.
    """
    best = min(
        candidates,
        key=lambda one: ((found := measure_rule(runs, one, loss=loss)).regret, found.false_alarms),
        default=None,
    )
    if best is None:
        raise UserError("no constants to choose from", hint="give at least one candidate")
    return replace(best, calibration=None)
