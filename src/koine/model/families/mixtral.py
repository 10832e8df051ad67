"""Mixtral: a Mistral with experts in every layer, whose gates are renormalised."""

from __future__ import annotations

from typing import Any

from koine.fields import Fields
from koine.model.config import LayerSpec, ModelConfig
from koine.model.families.family import LLAMA_NORMS, Family, TensorNames
from koine.model.families.mixtures import read_mixture, write_mixture
from koine.model.families.reading import (
    Defaults,
    layer_count,
    read_common,
    read_window,
    same_layers,
    window_of,
    write_common,
)

DEFAULTS = Defaults(context=131_072, kv_heads=8, eps=1e-5, theta=1_000_000.0)


def _read(fields: Fields) -> ModelConfig:
    return ModelConfig(
        **read_common(fields, DEFAULTS),
        layers=same_layers(layer_count(fields), LayerSpec(window=read_window(fields))),
        mixture=read_mixture(fields, experts=8, top_k=2, load_balancing=0.001, normalise_top_k=True),
        arrangement="pre_norm",
        norm="rms_norm",
        logit_scale=1.0,
        model_type="mixtral",
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_common(config, DEFAULTS),
        **write_mixture(config, "num_local_experts"),
        "sliding_window": window_of(config),
    }


FAMILY = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read=_read,
    write=_write,
    names=TensorNames(
        layer=LLAMA_NORMS
        | {
            "mlp.router": "block_sparse_moe.gate",
            "mlp.experts.N.gate_proj": "block_sparse_moe.experts.N.w1",
            "mlp.experts.N.up_proj": "block_sparse_moe.experts.N.w3",
            "mlp.experts.N.down_proj": "block_sparse_moe.experts.N.w2",
        }
    ),
)
