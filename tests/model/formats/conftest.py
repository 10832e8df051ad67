"""A tiny Llama of transformers, for tests of what is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

LLAMA: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the list of verified files out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def llama(folder: Path, seed: int = 0, **named: Any) -> Path:
    """Save a random Llama."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **named))
    model.save_pretrained(folder)
    return folder


def ids() -> torch.Tensor:
    return torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model.logits(model(ids()))
    return out
