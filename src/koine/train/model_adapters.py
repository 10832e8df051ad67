"""Checks of a model against its data before a training begins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.model.language_model import LanguageModel


def check_packed_documents(model: Any, mixture: Mixture, where: Path) -> None:
    """Check that training can write the model, and that it isolates the documents of the mixture's rows.

    Raises `UserError` where not.
    """
    isolates: bool | None = getattr(model, "isolates_documents", None)
    if isolates is None:
        raise UserError(
            f"{type(model).__name__} is neither our decoder nor a model of transformers, which are what training writes",
            where=where,
            hint="give a model that koine.model.load_causal_lm opened",
        )
    if not isolates and mixture.packing != "one_per_row" and not mixture.cross_document_attention:
        raise UserError(
            f"{model.architecture} cannot keep the documents of a row apart",
            where=where,
            hint="choose packing 'one_per_row' (one document a row), or let attention cross documents",
        )


def check_data_beyond_the_model(model: LanguageModel, mixture: Mixture, vocab_size: int) -> None:
    """Raise `UserError` for ids (below `vocab_size`) that the model has no row for, or rows longer than it allows."""
    known, most = model.vocab_size, model.context_length
    if known < vocab_size:
        raise UserError(
            f"the data have ids up to {vocab_size}, the model knows {known}",
            hint="tokenize with the model's own tokenizer",
        )
    longest = max(shape.sequence_length for shape in mixture.shapes())
    if most is not None and longest > most:
        raise UserError(
            f"a sequence length of {longest} is longer than the model allows", hint=f"choose at most {most}"
        )


def prepare(model: LanguageModel, *, gradient_checkpointing: bool) -> None:
    """Put a model into training mode, with its blocks recomputed in the backward pass where that is wanted."""
    model.train()
    model.set_gradient_checkpointing(gradient_checkpointing)
