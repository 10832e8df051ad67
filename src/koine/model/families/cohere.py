"""Cohere (Command R): attention and feed-forward in parallel on one LayerNorm, RoPE in every layer."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig, QKNorm
from koine.model.families.family import Family, TensorNames
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    same_layers,
    write_common,
)

DEFAULTS = Defaults(
    context=8192, theta=500_000.0, eps=1e-5, eps_name="layer_norm_eps", tied=True, pad=0, bos=5, eos=255_001
)


def _read(fields: Fields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    qk_norm: QKNorm | None = "heads" if fields.boolean("use_qk_norm", False) else None
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(qk_norm=qk_norm)),
        attention_bias=bias,
        attention_out_bias=bias,
        logit_scale=fields.number("logit_scale", 0.0625),
        model_type="cohere",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        "attention_bias": config.attention_bias,
        "logit_scale": config.logit_scale,
        "use_qk_norm": config.layers[0].qk_norm is not None,
    }


FAMILY = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(halves=False),
)
