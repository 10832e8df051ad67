"""Llama 1 to 3 and SmolLM2."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    same_layers,
    write_common,
)

DEFAULTS = Defaults(context=2048)


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec()),
        arrangement="pre_norm",
        norm="rms_norm",
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
        logit_scale=1.0,
        model_type="llama",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_NORMS),
)
