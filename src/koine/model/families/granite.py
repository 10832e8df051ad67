"""Granite: a Llama with multipliers of embedding, residual stream, scores and logits."""

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
    whole,
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
        attention_scale=fields.number("attention_multiplier", 1.0),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1.0, above=0),
        model_type="granite",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "attention_multiplier": config.score_scale,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": whole(1.0 / config.logit_scale),
    }


FAMILY = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_NORMS),
)
