"""OLMo-2: a norm after each sublayer, and over all heads of q and of k."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import Family, TensorNames
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    same_layers,
    write_common,
)

DEFAULTS = Defaults(context=2048, eps=1e-5, pad=1, bos=None, eos=50_279)


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(qk_norm="full")),
        arrangement="post_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=1.0,
        model_type="olmo2",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config, DEFAULTS), "attention_bias": config.attention_bias}


FAMILY = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(
        layer={
            "attention_out_norm": "post_attention_layernorm",
            "feed_forward_out_norm": "post_feedforward_layernorm",
        }
    ),
)
