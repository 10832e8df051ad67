"""Mistral: a Llama with a window in every layer, or none."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    read_window,
    same_layers,
    window_of,
    write_common,
)

DEFAULTS = Defaults(context=131_072, kv_heads=8)


def _read(fields: Fields) -> ModelConfig:
    window = None
    if "sliding_window" not in fields.value:
        window = 4096
    else:
        window = read_window(fields)
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(window=window)),
        arrangement="pre_norm",
        norm="rms_norm",
        logit_scale=1.0,
        model_type="mistral",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config, DEFAULTS), "sliding_window": window_of(config)}


FAMILY = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(layer=LLAMA_NORMS),
)
