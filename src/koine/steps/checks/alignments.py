"""Checks of the steps of preference training."""

from __future__ import annotations

from typing import Any

from koine.errors import UserError
from koine.plan.step import PlannedInput


def watched(
    models: dict[str, PlannedInput],
    pairs: PlannedInput | None = None,
    prompts: PlannedInput | None = None,
    **_: Any,
) -> None:
    """Check that there are models to watch, and pairs or prompts."""
    if not models:
        raise UserError("no model to watch", hint="give the folders of a training's checkpoints")
    if pairs is None and prompts is None:
        raise UserError("neither pairs nor prompts", hint="give held-out pairs, prompts to answer, or both")
    for name, model in models.items():
        if model.exists and not (model.path / "config.json").exists():
            raise UserError(
                f"'{name}' holds no model", where=model.path, hint="give a folder that holds config.json"
            )


def trained_online(
    model: PlannedInput, prompts: PlannedInput, reference: PlannedInput | None = None, *, k: int, **_: Any
) -> None:
    """Check that the models are models, and that there are completions to compare."""
    if k < 2:
        raise UserError(f"k is {k}: completions of a prompt are compared", hint="draw 2 or more of each")
    for one in (model, reference):
        if one is not None and one.exists and not (one.path / "config.json").exists():
            raise UserError("holds no model", where=one.path, hint="give a folder that holds config.json")
