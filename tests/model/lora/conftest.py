"""Random checkpoints of many classes, made by `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the reference classes need the extra [hf]")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MADE: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "smollm3": lambda: transformers.SmolLM3Config(**SIZES),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=16),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SIZES, head_dim=8),
    "olmo2": lambda: transformers.Olmo2Config(**SIZES),
    "granite": lambda: transformers.GraniteConfig(**SIZES),
    "cohere": lambda: transformers.CohereConfig(**SIZES),
    "cohere2": lambda: transformers.Cohere2Config(**SIZES, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
}
"""The last one is not computed by our decoder, and stores its matrices transposed."""


def save_random(kind: str, folder: Path) -> Path:
    """Write a random checkpoint of a class; all weights are far from their first values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MADE[kind](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
