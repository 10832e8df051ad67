"""Qwen3-MoE: a Qwen3 with experts in every layer, and a window in all layers or none."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
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
    Defaults,
    layer_count,
    read_common,
    read_window,
    same_layers,
    window_of,
    write_common,
)

DEFAULTS = Defaults(context=32_768, kv_heads=4, bos=None, eos=None)


def _read(fields: Fields) -> ModelConfig:
    check_every_layer_has_experts(fields)
    window = read_window(fields, 4096) if fields.boolean("use_sliding_window", False) else None
    bias = fields.boolean("attention_bias", False)
    common = read_common(fields, DEFAULTS)
    return ModelConfig(
        **common | {"intermediate_size": read_expert_size(fields, 768)},
        layers=same_layers(layer_count(fields), LayerSpec(window=window, qk_norm="head")),
        mixture=read_mixture(
            fields,
            experts=128,
            top_k=8,
            load_balancing=0.001,
            normalise_top_k=fields.boolean("norm_topk_prob", False),
        ),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=1.0,
        model_type="qwen3_moe",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    window = window_of(config)
    return {
        **write_common(config, DEFAULTS),
        **write_expert_size(config),
        **write_mixture(config),
        "norm_topk_prob": normalises(config),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": config.attention_bias,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_MOE_NAMES),
)
