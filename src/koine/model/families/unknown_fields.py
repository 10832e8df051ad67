"""Refuse fields of a `config.json` that nothing reads and that may change the computation.

A field that no family knows is written again as it stands. Where its name says that it is about the
computation, such as `attention_sinks` or `rope_boost`, ignoring it would give wrong numbers without a word.
"""

from __future__ import annotations

from typing import Any

from koine.errors import UserError
from koine.fields import Fields, short_repr

HARMLESS = frozenset({
    "use_cache", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "embedding_dropout",
    "residual_dropout", "classifier_dropout", "layer_norm_type", "max_window_layers", "head_dim",
    "no_rope_layer_interval", "sliding_window", "sliding_window_pattern", "_sliding_window_pattern",
    "cache_implementation", "pretraining_tp", "output_attentions", "output_hidden_states", "is_llama_config",
    "router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "layer_types", "chunk_size_feed_forward",
    "experts_implementation", "original_max_position_embeddings",
})  # fmt: skip
"""Fields of training, storage and generation, and those that a family reads where they matter."""
ABOUT_THE_COMPUTATION = (
    "rope", "rotary", "position", "scal", "factor", "multiplier", "cap", "norm", "bias", "window", "attention",
    "attn", "head", "expert", "moe", "router", "activation", "residual", "alibi", "sink", "mamba", "conv",
    "parallel", "layer", "mlp",
)  # fmt: skip
"""Parts of names."""


def check_unknown_fields(fields: Fields) -> None:
    """Raise `UserError` for a field that nothing read and that may change the computation.

    A field that is null, false or empty says that there is nothing of the kind.
    """
    for name in sorted(fields.value.keys() - fields.names_read - HARMLESS):
        value = fields.value[name]
        # A leading underscore marks what a library keeps for itself; kernels do not change what is computed.
        private = name.startswith("_") or "flash" in name or "implementation" in name
        about = not private and any(word in name for word in ABOUT_THE_COMPUTATION)
        if about and value not in (None, False, [], {}, ""):
            raise UserError(
                f"the field '{name}' is {short_repr(value)}, and a {fields.value.get('model_type')} has no such field",
                where=fields.where,
                hint="it may change the computation: remove it if it does not, or convert the model to a class "
                "of transformers that has it",
            )


def check_code(fields: Fields, architecture: str) -> None:
    """Raise `UserError` where `auto_map` names another class than the family's: its code is never run."""
    named: Any = fields.get("auto_map", None)
    if named is None:
        return
    if not isinstance(named, dict):
        raise fields.wrong("auto_map", "an object")
    for auto, path in named.items():
        if auto == "AutoModelForCausalLM" and str(path).rpartition(".")[2] != architecture:
            raise UserError(
                f"needs Python code that comes with it ({path}), which is never run",
                where=fields.where,
                hint=f"remove 'auto_map' if the model is a plain {architecture}, else convert it to a class of "
                "transformers",
            )
