"""A model of a few thousand parameters."""

from __future__ import annotations

import torch

from koine.model.config import ModelConfig, hybrid_layers
from koine.model.decoder import Decoder


def small_config(vocab_size: int = 64) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=hybrid_layers(2, window=8, full_every=2),
    )


def small_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(small_config())
