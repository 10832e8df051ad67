"""Gemma-3, the text model: norms before and after each sublayer and of q and k, two bases of RoPE."""

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
    read_layer_types,
    read_rope,
    read_scaling,
    read_sizes,
    read_window,
    rope_fields,
    unsupported,
    whole,
    window_of,
    write_rope,
    write_sizes,
)

DEFAULTS = Defaults(
    context=131_072, kv_heads=4, head_dim=256, activation_name="hidden_activation",
    activation="gelu_pytorch_tanh", theta=1_000_000.0, tied=True, pad=0, bos=2, eos=1,
)  # fmt: skip
LOCAL_THETA = 10_000.0


def _read(fields: Fields) -> ModelConfig:
    count = layer_count(fields)
    every = fields.integer("sliding_window_pattern", 6, low=1)
    types = read_layer_types(
        fields, count, [WINDOWED if (index + 1) % every else FULL for index in range(count)]
    )
    window = read_window(fields, 4096)
    is_set(fields, "use_bidirectional_attention", False, "causal attention")
    # The class has the field and does not compute it.
    is_set(fields, "attn_logit_softcapping", 0, "scores of Gemma-3 without a cap")
    bias = fields.boolean("attention_bias", False)
    sizes = read_sizes(fields, DEFAULTS)
    rope = rope_fields(fields)
    by_type = any(name in rope.value for name in (FULL, WINDOWED))
    everywhere = rope.inner(FULL, {}) if by_type else rope
    windowed = rope.inner(WINDOWED, {}) if by_type else Fields({}, fields.where)
    if read_scaling(windowed, sizes["max_position_embeddings"]) is not None:
        raise unsupported(windowed, "rope_type of the windowed layers", windowed.value, "'default'")
    local = windowed.number("rope_theta", fields.number("rope_local_base_freq", LOCAL_THETA))
    return ModelConfig(
        **sizes,
        **read_rope(fields, everywhere, DEFAULTS.theta, sizes["head_dim"], sizes["max_position_embeddings"]),
        layers=tuple(
            LayerSpec(window=window, rope_theta=local, qk_norm="head")
            if name == WINDOWED
            else LayerSpec(qk_norm="head")
            for name in types
        ),
        arrangement="sandwich",
        norm="rms_norm",
        norm_unit_offset=True,
        attention_bias=bias,
        attention_out_bias=bias,
        attention_scale=fields.number("query_pre_attn_scalar", 256.0, above=0) ** -0.5,
        embedding_scale=sizes["hidden_size"] ** 0.5,
        logit_scale=1.0,
        logit_softcap=fields.number("final_logit_softcapping", None),
        model_type="gemma3_text",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    local = next((layer.rope_theta for layer in config.layers if layer.rope_theta is not None), LOCAL_THETA)
    return {
        **write_sizes(config, DEFAULTS),
        "rope_parameters": {FULL: write_rope(config), WINDOWED: write_rope(config, local)},
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": whole(config.score_scale**-2),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": window_of(config) or config.max_position_embeddings,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
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
