"""Phi-3 and Phi-4-mini: a Llama with fused projections, and perhaps partial rotation and a window."""

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

DEFAULTS = Defaults(context=4096, partial_rotary=True, eps=1e-5, pad=32_000, eos=32_000)


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(window=read_window(fields))),
        arrangement="pre_norm",
        norm="rms_norm",
        logit_scale=1.0,
        model_type="phi3",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {**write_common(config, DEFAULTS), "sliding_window": window_of(config)}


FAMILY = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(
        layer=LLAMA_NORMS,
        fused={
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        },
    ),
)
