"""A summary of a configuration as JSON: parameters, FLOPs, KV cache."""

from __future__ import annotations

from typing import Any

from koine.model.config import ModelConfig
from koine.model.counting import (
    all_full,
    cache_bytes,
    cache_bytes_per_token,
    count_parameters,
    forward_flops_per_token,
    training_flops_per_token,
)
from koine.model.formats.config_json import model_type
from koine.model.layer_patterns import variant_name

LENGTHS = {"8k": 8 * 1024, "128k": 128 * 1024}


def describe_config(config: ModelConfig, *, length: int = 4096) -> dict[str, Any]:
    """Count parameters, FLOPs per token at `length`, and bytes of a bfloat16 KV cache, without allocating."""
    parameters = count_parameters(config)
    cache: dict[str, int | float] = {"per_token": cache_bytes_per_token(config)}
    for name, time in LENGTHS.items():
        held = cache_bytes(config, time)
        cache[name] = held
        cache[name + "_share_of_all_full"] = held / cache_bytes(all_full(config), time)
    windows = sorted({layer.window for layer in config.layers if layer.window is not None})
    full = sum(layer.window is None for layer in config.layers)
    return {
        "model_type": model_type(config),
        "attention": variant_name(config),
        "rope_theta": config.rope_theta if any(layer.rope for layer in config.layers) else None,
        "layers": f"{len(config.layers)} ({len(config.layers) - full} windowed {windows}, {full} full)"
        if windows
        else f"{len(config.layers)} (all full)",
        "experts": _experts(config),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "length": length,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "embedding": parameters.embedding,
            "head": parameters.head,
            "non_embedding": parameters.non_embedding,
        },
        "flops_per_token": {
            "forward": forward_flops_per_token(config, length),
            "training": training_flops_per_token(config, length),
        },
        "cache_bytes": cache,
    }


def _experts(config: ModelConfig) -> str:
    mixture = config.mixture
    if mixture is None:
        return "none (dense)"
    router = "linear router" if mixture.domain_size is None else "router over domain embeddings"
    shared = " normalised" if mixture.normalise_top_k else ""
    if mixture.shared_expert:
        shared += " and one shared, gated" if mixture.shared_gate else " and one shared"
    attention = {
        "averaged": "averaged attention",
        "kv-experts": "attention experts",
        "shared-kv": "attention experts with shared keys and values",
    }
    names = ", ".join(mixture.experts)
    kinds = f"top-{mixture.top_k}{shared}, {router}, {attention[mixture.attention]}"
    return f"{len(mixture.experts)}, {kinds}: {names}"
