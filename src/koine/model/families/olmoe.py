"""OLMoE: a Llama with experts in every layer, and a norm over all heads of q and of k."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.mixtures import LLAMA_MOE_NAMES, normalises, read_mixture, write_mixture
from koine.model.families.reading import (
    Defaults,
    is_set,
    keep,
    layer_count,
    read_common,
    same_layers,
    write_common,
)

DEFAULTS = Defaults(context=4096, eps=1e-5, pad=1, bos=None, eos=50_279)


def _read(fields: Fields) -> ModelConfig:
    is_set(fields, "clip_qkv", None, "q, k and v without clipping")
    keep(fields, "clip_qkv")
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(qk_norm="full")),
        mixture=read_mixture(
            fields,
            experts=64,
            top_k=8,
            load_balancing=0.01,
            normalise_top_k=fields.boolean("norm_topk_prob", False),
        ),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=1.0,
        model_type="olmoe",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        **write_mixture(config),
        "norm_topk_prob": normalises(config),
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_MOE_NAMES),
)
