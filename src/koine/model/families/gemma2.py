"""Gemma-2: norms before and after each sublayer, every second layer windowed, soft-capped scores and logits."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.reading import (
    FULL,
    WINDOWED,
    Defaults,
    is_set,
    layer_count,
    layer_types_of,
    read_common,
    read_layer_types,
    read_window,
    whole,
    window_of,
    write_common,
)

DEFAULTS = Defaults(
    context=8192, kv_heads=4, head_dim=256, activation_name="hidden_activation",
    activation="gelu_pytorch_tanh", tied=True, pad=0, bos=2, eos=1,
)  # fmt: skip


def _read(fields: Fields) -> ModelConfig:
    count = layer_count(fields)
    types = read_layer_types(fields, count, [FULL if index % 2 else WINDOWED for index in range(count)])
    window = read_window(fields, 4096)
    is_set(fields, "use_bidirectional_attention", False, "causal attention")
    bias = fields.boolean("attention_bias", False)
    common = read_common(fields, DEFAULTS)
    return ModelConfig(
        **common,
        layers=tuple(LayerSpec(window=window if name == WINDOWED else None) for name in types),
        arrangement="sandwich",
        norm="rms_norm",
        norm_unit_offset=True,
        attention_bias=bias,
        attention_out_bias=bias,
        attention_scale=fields.number("query_pre_attn_scalar", 256.0, above=0) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        embedding_scale=common["hidden_size"] ** 0.5,
        logit_scale=1.0,
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        model_type="gemma2",
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
    """Return a soft cap; null is none."""
    cap: float | None = fields.number(name, None if name in fields.value else default)
    return cap


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": whole(config.score_scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": window_of(config) or config.max_position_embeddings,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(
        layer={
            "attention_norm": "input_layernorm",
            "attention_out_norm": "post_attention_layernorm",
            "feed_forward_norm": "pre_feedforward_layernorm",
            "feed_forward_out_norm": "post_feedforward_layernorm",
        }
    ),
)
