"""What differs between our decoder and a model of `transformers` when they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from koine.errors import UserError
from koine.model.causal_lm import CausalLM
from koine.model.decoder import Decoder

if TYPE_CHECKING:
    from koine.data.mixture import Mixture


def check_packed_documents(model: nn.Module, mixture: Mixture, where: Path) -> None:
    """Raise `UserError` for a model that training cannot write, or that cannot keep the documents of the mixture's rows apart."""
    if isinstance(model, Decoder):
        return
    if not isinstance(model, CausalLM):
        raise UserError(
            f"{type(model).__name__} is neither our decoder nor a model of transformers, which are what training writes",
            where=where,
            hint="give a model that koine.model.load_causal_lm opened",
        )
    if mixture.packing != "one_per_row" and not mixture.cross_document_attention:
        raise UserError(
            f"{type(model.inner).__name__} cannot keep the documents of a row apart",
            where=where,
            hint="choose packing 'one_per_row' (one document a row), or let attention cross documents",
        )


def check_data_beyond_the_model(model: Decoder | CausalLM, mixture: Mixture, vocab_size: int) -> None:
    """Raise `UserError` for ids (below `vocab_size`) that the model has no row for, or rows longer than it allows."""
    known: int
    most: int | None
    if isinstance(model, Decoder):
        known, most = model.config.vocab_size, model.config.max_position_embeddings
    else:
        known = model.rows
        most = getattr(model.inner.config, "max_position_embeddings", None)
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


def prepare(model: nn.Module, *, gradient_checkpointing: bool) -> None:
    """Put a model into training mode, with its blocks recomputed in the backward pass where that is wanted."""
    model.train()
    if isinstance(model, Decoder):
        model.gradient_checkpointing = gradient_checkpointing
    elif isinstance(model, CausalLM):
        _switch_checkpointing(model.inner, on=gradient_checkpointing)


def _switch_checkpointing(inner: Any, *, on: bool) -> None:
    if on and not inner.supports_gradient_checkpointing:
        raise UserError(
            f"{type(inner).__name__} has no gradient checkpointing in transformers",
            hint="leave it off, and choose a smaller micro batch",
        )
    # The newer name, where there is one: the older then warns.
    kind = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
    if on:
        arguments = {f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(inner, f"{kind}_checkpointing_enable")(**arguments)
    else:
        getattr(inner, f"{kind}_checkpointing_disable")()


def configuration(model: nn.Module) -> Any:
    """What a model is made of: our `ModelConfig`, or the fields of a `transformers` configuration; `None` where it says nothing."""
    if not isinstance(model, CausalLM):
        return getattr(model, "config", None)
    # The version that wrote it, the folder it lay in and the precision it was opened in are no part of what it is.
    passing = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in model.inner.config.to_dict().items() if key not in passing}
