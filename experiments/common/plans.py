"""Parts that the plan of every experiment has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from koine.errors import UserError, did_you_mean
from koine.plan import Artifact, Plan

Scale = TypeVar("Scale")


def choose_scale(scale: str, scales: Mapping[str, Scale]) -> Scale:
    """Return the sizes of a scale; raises `UserError` for an unknown one."""
    if scale not in scales:
        raise UserError(f"unknown scale '{scale}'", hint=did_you_mean(scale, scales))
    return scales[scale]


def export_verdicts(plan: Plan, judged: Artifact) -> None:
    """Copy `results.json` of the step that judges into the run's folder, and say so at the end."""
    plan.export(judged / "results.json", "results.json")
    plan.closing(
        lambda run: (
            f"The verdicts are in {run.path(run.folder / 'results.json')} "
            f"and {run.path(run.folder / 'report.html')}."
        )
    )
