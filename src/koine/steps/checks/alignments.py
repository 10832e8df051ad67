"""Checks of the steps of preference training."""

from __future__ import annotations

from typing import Any

from koine.errors import UserError
from koine.files import sha256_file
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


def inspected_groups(
    pairs: PlannedInput, model: PlannedInput, held_out: PlannedInput | None = None, **_: Any
) -> None:
    """Check that token shards are groups, made with the tokenizer of the model."""
    from koine.data.shards import TokenSource

    tokenizer = model.path / "tokenizer.json"
    for one in (pairs, held_out):
        if one is None or not (one.path / "manifest.json").is_file():
            continue
        source = TokenSource(one.path, verify=False)
        if source.kind == "documents":
            raise UserError(
                "holds documents, not groups of completions",
                where=one.path,
                hint="tokenize with --kind preferences, labelled or scored",
            )
        if tokenizer.is_file() and source.tokenizer_fingerprint != sha256_file(tokenizer):
            raise UserError(
                f"tokenized with another tokenizer than {model.path}",
                where=one.path,
                hint="tokenize again with the tokenizer of the model",
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
