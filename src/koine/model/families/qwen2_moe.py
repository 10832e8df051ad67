"""Qwen2-MoE: a Qwen2 with experts in every layer, and a shared one with a gate of its own."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import SIZES, LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.mixtures import (
    LLAMA_MOE_NAMES,
    check_every_layer_has_experts,
    normalises,
    read_expert_size,
    read_mixture,
    write_expert_size,
    write_mixture,
)
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

DEFAULTS = Defaults(context=32_768, kv_heads=16, bos=None, eos=None)


def _read(fields: Fields) -> ModelConfig:
    check_every_layer_has_experts(fields)
    count = layer_count(fields)
    window = read_window(fields, 4096) if fields.boolean("use_sliding_window", False) else None
    last = fields.integer("max_window_layers", 28, low=0) if window is not None else 0
    types = read_layer_types(
        fields, count, [FULL if index % 2 or index >= last else WINDOWED for index in range(count)]
    )
    keep(fields, "max_window_layers")
    common = read_common(fields, DEFAULTS)
    shared = fields.integer("shared_expert_intermediate_size", 5632, low=1, high=SIZES["intermediate_size"])
    size = read_expert_size(fields, 1408)
    return ModelConfig(
        **common | {"intermediate_size": size},
        layers=tuple(LayerSpec(window=window if name == WINDOWED else None) for name in types),
        mixture=read_mixture(
            fields,
            experts=60,
            top_k=4,
            load_balancing=0.001,
            normalise_top_k=fields.boolean("norm_topk_prob", False),
            shared_expert=True,
            shared_size=None if shared == size else shared,
            shared_gate=True,
        ),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=fields.boolean("qkv_bias", True),
        logit_scale=1.0,
        model_type="qwen2_moe",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = window_of(config)
    return {
        **write_common(config, DEFAULTS),
        **write_expert_size(config),
        **write_mixture(config),
        "shared_expert_intermediate_size": config.dense_size,
        "norm_topk_prob": normalises(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types_of(config),
    }


FAMILY = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_MOE_NAMES),
)
