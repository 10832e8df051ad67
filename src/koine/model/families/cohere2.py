"""Cohere2 (Command R7B, Command A): Cohere with windows and RoPE in most layers, neither in the others."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.reading import (
    FULL,
    WINDOWED,
    Defaults,
    layer_count,
    layer_types_of,
    read_common,
    read_layer_types,
    read_window,
    window_of,
    write_common,
)

DEFAULTS = Defaults(context=8192, eps=1e-5, eps_name="layer_norm_eps", tied=True, pad=0, bos=5, eos=255_001)


def _read(fields: Fields) -> ModelConfig:
    count = layer_count(fields)
    every = fields.integer("sliding_window_pattern", 4, low=1)
    types = read_layer_types(
        fields, count, [WINDOWED if (index + 1) % every else FULL for index in range(count)]
    )
    window = read_window(fields, 4096)
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=tuple(
            LayerSpec(window=window) if name == WINDOWED else LayerSpec(rope=False) for name in types
        ),
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=fields.number("logit_scale", 0.0625),
        model_type="cohere2",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "logit_scale": config.logit_scale,
        # A model of full layers alone has no window, but the class requires one.
        "sliding_window": window_of(config) or config.max_position_embeddings,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(halves=False),
)
