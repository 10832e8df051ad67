from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from koine.model import ModelConfig, hybrid_layers


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> ModelConfig:
    """Return four layers, window 7, GQA; large initial weights, so that attention is far from uniform."""
    return ModelConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=hybrid_layers(4, window=7),
        initializer_range=0.15,
        eos_token_id=98,
    )
