"""The decoder, its directories, its presets and its text. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.model.checkpoint import load_model, save_model, save_state
    from koine.model.config import LayerSpec, ModelConfig, hybrid_layers
    from koine.model.config_json import read_config
    from koine.model.decoder import Decoder
    from koine.model.generation import generate
    from koine.model.interop import CausalLM, load_causal_lm, register_with_transformers
    from koine.model.presets import PRESETS, preset
    from koine.model.requests import Request
    from koine.model.sampling import Sampling
    from koine.model.scheduler import Scheduler
    from koine.model.variants import VARIANTS, set_rope_theta, variant_layers, variant_name, with_attention

__all__ = [
    "PRESETS",
    "VARIANTS",
    "CausalLM",
    "Decoder",
    "LayerSpec",
    "ModelConfig",
    "Request",
    "Sampling",
    "Scheduler",
    "generate",
    "hybrid_layers",
    "load_causal_lm",
    "load_model",
    "preset",
    "read_config",
    "register_with_transformers",
    "save_model",
    "save_state",
    "set_rope_theta",
    "variant_layers",
    "variant_name",
    "with_attention",
]

_HOME = {
    "PRESETS": "presets",
    "preset": "presets",
    "CausalLM": "interop",
    "load_causal_lm": "interop",
    "register_with_transformers": "interop",
    "Decoder": "decoder",
    "LayerSpec": "config",
    "ModelConfig": "config",
    "hybrid_layers": "config",
    "read_config": "config_json",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "save_state": "checkpoint",
    "Sampling": "sampling",
    "Request": "requests",
    "Scheduler": "scheduler",
    "generate": "generation",
    "VARIANTS": "variants",
    "set_rope_theta": "variants",
    "variant_layers": "variants",
    "variant_name": "variants",
    "with_attention": "variants",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"koine.model.{_HOME[name]}"), name)
    raise AttributeError(f"module 'koine.model' has no attribute '{name}'")
