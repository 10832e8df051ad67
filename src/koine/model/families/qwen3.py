"""Qwen3: a Llama with a norm of each head of q and k, and windows in upper layers."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.reading import (
    FULL,
    WINDOWED,
    Defaults,
    keep,
    layer_count,
    layer_types_of,
    read_common,
    read_layer_types,
    read_window,
    window_of,
    write_common,
)

DEFAULTS = Defaults(context=32_768, kv_heads=32, head_dim=128, bos=None, eos=None)


def _read(fields: Fields) -> ModelConfig:
    count = layer_count(fields)
    window = read_window(fields, 4096) if fields.boolean("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", 28, low=0) if window is not None else count
    types = read_layer_types(fields, count, [FULL if index < first else WINDOWED for index in range(count)])
    bias = fields.boolean("attention_bias", False)
    keep(fields, "max_window_layers")
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=tuple(
            LayerSpec(window=window if name == WINDOWED else None, qk_norm="head") for name in types
        ),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=1.0,
        model_type="qwen3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = window_of(config)
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_NORMS),
)
