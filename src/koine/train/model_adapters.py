"""Differences between our decoder and a model of `transformers` in training."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from koine.errors import KoineWarning, UserError
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture


def check_packed_documents(model: nn.Module, mixture: Mixture, where: Path) -> None:
    """Raise `UserError` for a model without a document mask if rows have several documents.

    A model that is neither ours nor of `transformers` is refused too: training cannot write it.
    """
    if isinstance(model, Decoder):
        return
    if not isinstance(model, CausalLM):
        raise UserError(
            f"{type(model).__name__} is neither Koine's decoder nor a model of transformers",
            where=where,
            hint="training writes only these; give a model that koine.model.load_causal_lm opened",
        )
    if mixture.packing != "one_per_row" and not mixture.cross_document_attention:
        raise UserError(
            f"{type(model.inner).__name__} cannot keep the documents of a row apart",
            where=where,
            hint="choose packing 'one_per_row' (one document a row), or let attention cross documents",
        )


def check_data_fits_model(model: Decoder | CausalLM, mixture: Mixture, vocab_size: int) -> None:
    """Raise `UserError` for a model with fewer ids than `vocab_size`, or fewer positions than a row."""
    model_vocab_size: int
    max_positions: int | None
    if isinstance(model, Decoder):
        model_vocab_size, max_positions = model.config.vocab_size, model.config.max_position_embeddings
    else:
        model_vocab_size = model.rows
        max_positions = getattr(model.inner.config, "max_position_embeddings", None)
    if model_vocab_size < vocab_size:
        raise UserError(
            f"the data have ids up to {vocab_size}, the model knows {model_vocab_size}",
            hint="tokenize with the model's own tokenizer",
        )
    longest = max(shape.sequence_length for shape in mixture.shapes())
    if max_positions is not None and longest > max_positions:
        raise UserError(
            f"a sequence length of {longest} is longer than the model allows",
            hint=f"choose at most {max_positions}",
        )


def prepare_model(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Put a model into training mode and switch its gradient checkpointing."""
    model.train()
    if isinstance(model, Decoder):
        model.gradient_checkpointing = gradient_checkpointing
    elif isinstance(model, CausalLM):
        _set_gradient_checkpointing(model.inner, on=gradient_checkpointing)


def _set_gradient_checkpointing(inner: Any, *, on: bool) -> None:
    if on and not inner.supports_gradient_checkpointing:
        raise UserError(
            f"{type(inner).__name__} has no gradient checkpointing in transformers",
            hint="leave it off, and choose a smaller micro batch",
        )
    # Newer versions of transformers have another name and warn about the older one.
    kind = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    if on:
        arguments = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(inner, f"{kind}_checkpointing_enable")(**arguments)
    else:
        getattr(inner, f"{kind}_checkpointing_disable")()


def compile_blocks(model: nn.Module, settings: TrainSettings) -> None:
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


def configuration(model: nn.Module) -> Any:
    """Return our `ModelConfig`, or the fields of a `transformers` one; None for a model without."""
    if not isinstance(model, CausalLM):
        return getattr(model, "config", None)
    # The version that wrote it, its folder and the precision it was opened in do not change the result.
    ignored = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in model.inner.config.to_dict().items() if key not in ignored}
