"""Prepare a model for training, and check it against its data."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture
    from koine.model.language_model import LanguageModel
    from koine.model.packed_documents import DocumentIsolation


def check_packed_documents(model: Any, mixture: Mixture, where: Path) -> None:
    """Raise `UserError` for a model that cannot keep documents apart if rows have several.

    A class of `transformers` is tried out on two short rows, only where rows have several documents. A model
    that is no `LanguageModel` is refused too: training cannot write it.
    """
    if not hasattr(type(model), "isolates_documents"):
        raise UserError(
            f"{type(model).__name__} is neither Koine's decoder nor a model of transformers",
            where=where,
            hint="training writes only these; give a model that koine.model.load_causal_lm opened",
        )
    if mixture.packing == "one_per_row" or mixture.cross_document_attention or model.isolates_documents:
        return
    isolation: DocumentIsolation | None = getattr(model, "isolation", None)
    reason = f": {isolation.reason}" if isolation is not None else ""
    raise UserError(
        f"{model.architecture} cannot keep the documents of a row apart{reason}",
        where=where,
        hint="choose --packing one_per_row (one document a row), or let attention cross documents "
        "(--cross-document-attention)",
    )


def check_data_fits_model(model: LanguageModel, mixture: Mixture, vocab_size: int) -> None:
    """Raise `UserError` for a model with fewer ids than `vocab_size`, or fewer positions than a row."""
    if model.vocab_size < vocab_size:
        raise UserError(
            f"the data have ids up to {vocab_size}, the model knows {model.vocab_size}",
            hint="tokenize with the model's own tokenizer",
        )
    longest = max(shape.sequence_length for shape in mixture.shapes())
    if model.context_length is not None and longest > model.context_length:
        raise UserError(
            f"a sequence length of {longest} is longer than the model allows",
            hint=f"choose at most {model.context_length}",
        )


def prepare_model(model: LanguageModel, *, gradient_checkpointing: bool) -> None:
    """Put a model into training mode and switch its gradient checkpointing."""
    model.train()
    model.set_gradient_checkpointing(gradient_checkpointing)


def compile_blocks(model: LanguageModel, settings: TrainSettings) -> None:
    """Apply torch.compile to each block if `settings.compile` is on; without a compiler, only warn."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or settings.compile != "on":
        return
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        warnings.warn(
            "compile: no C++ compiler was found (g++ or clang++); going on without torch.compile",
            KoineWarning,
            stacklevel=3,
        )
        return
    for block in blocks:
        block.compile()
