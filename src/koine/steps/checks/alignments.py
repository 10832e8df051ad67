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
