"""A seed and its branches: small dense models with one tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from koine.model import Decoder, ModelConfig, hybrid_layers, save_model
from koine.tokenizer import Tokenizer, train_tokenizer
from koine.tokenizer.special import SMALLEST_VOCABULARY


def small_config(**fields: int) -> ModelConfig:
    sizes = {
        "vocab_size": SMALLEST_VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
    }
    return ModelConfig(**(sizes | fields), layers=hybrid_layers(4, window=7), initializer_range=0.15)


@functools.cache
def smallest_tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes and special tokens."""
    return train_tokenizer(
        {"de": lambda: ["ein Text"]}, vocab_size=SMALLEST_VOCABULARY, scheme="natural", english_share=None
    )


def write_branches(
    folder: Path, names: tuple[str, ...], *, dtype: torch.dtype = torch.float32
) -> tuple[Path, dict[str, Path]]:
    """`folder/seed`, and a branch of each name: the seed with a tenth of its weights' spread added."""
    tokenizer = folder / "tokenizer"
    smallest_tokenizer().save(tokenizer)
    torch.manual_seed(0)
    seed = Decoder(small_config())
    save_model(seed, folder / "seed", tokenizer=tokenizer, dtype=dtype)
    paths = {}
    for name in names:
        branch = Decoder(seed.config)
        with torch.no_grad():
            for ours, theirs in zip(branch.parameters(), seed.parameters(), strict=True):
                ours.copy_(theirs + 0.1 * theirs.std().nan_to_num(0.0) * torch.randn_like(theirs))
        paths[name] = folder / name
        save_model(branch, paths[name], tokenizer=tokenizer, dtype=dtype)
    return folder / "seed", paths
