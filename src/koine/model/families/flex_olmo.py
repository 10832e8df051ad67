"""FlexOlmo: an OLMo-2 with experts in every layer."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.mixtures import ROUTER_NAMES, normalises, read_mixture, write_mixture
from koine.model.families.reading import Defaults, layer_count, read_common, same_layers, write_common

DEFAULTS = Defaults(context=4096, theta=500_000.0, pad=100_277, bos=None, eos=100_257)


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(qk_norm="full")),
        mixture=read_mixture(
            fields,
            experts=7,
            top_k=5,
            load_balancing=0.01,
            normalise_top_k=fields.boolean("norm_topk_prob", False),
        ),
        arrangement="post_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=1.0,
        model_type="flex_olmo",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        **write_mixture(config),
        "norm_topk_prob": normalises(config),
        "attention_bias": config.attention_bias,
    }


FAMILY = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(
        layer=ROUTER_NAMES
        | {
            "attention_out_norm": "post_attention_layernorm",
            "feed_forward_out_norm": "post_feedforward_layernorm",
        }
    ),
)
