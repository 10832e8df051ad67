"""Checks of the step that trains a reward model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.fields import check_integer, check_number
from koine.plan.step import PlannedInput

if TYPE_CHECKING:
    from koine.train.settings import TrainSettings


def reward_training(
    model: PlannedInput,
    pairs: PlannedInput,
    held_out: PlannedInput | None = None,
    *,
    settings: TrainSettings,
    steps: int,
    centring: float = 0.0,
    **_: Any,
) -> None:
    """Check the numbers, and that files which are there already are a model and pairs."""
    check_integer("steps", steps, low=1)
    check_number("centring", centring, low=0)
    if settings.evaluate_every and held_out is None:
        raise UserError("evaluate_every without held-out pairs", hint="give held_out")
    if model.exists and not (model.path / "config.json").exists():
        raise UserError("holds no model", where=model.path, hint="give a folder that holds config.json")
    for planned in (pairs, held_out):
        if planned is None or not planned.exists:
            continue
        from koine.align.reward_evaluation import check_pairs
        from koine.data.shards import TokenSource

        check_pairs(TokenSource(planned.path, verify=False))
