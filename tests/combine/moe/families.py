"""Small models of every dense family, for tests over families: a new family is covered by being there."""

from __future__ import annotations

from pathlib import Path

import torch

from koine.fields import Fields
from koine.model import Decoder, ModelConfig, save_model
from koine.model.families import families
from koine.tokenizer.special import SMALLEST_VOCABULARY
from tests.combine.models import smallest_tokenizer

FIELDS = {
    "vocab_size": SMALLEST_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 7,
    "initializer_range": 0.15,
    "query_pre_attn_scalar": 16,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields of a `config.json`; a class ignores those that it does not have."""


def dense_configs() -> dict[str, ModelConfig]:
    """Return a small model of each family whose feed-forward can be an expert's."""
    read = {name: family.read(Fields(FIELDS, Path("config.json"))) for name, family in families().items()}
    return {
        name: config
        for name, config in read.items()
        if config.mixture is None and config.gated and not config.mlp_bias
    }


def write_family(
    folder: Path,
    family: str,
    names: tuple[str, ...],
    *,
    spread: float = 0.1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Path, dict[str, Path]]:
    """Write `folder/seed`, and a branch of each name: the seed with `spread` times random numbers added."""
    tokenizer = folder / "tokenizer"
    smallest_tokenizer().save(tokenizer)
    torch.manual_seed(0)
    seed = noisy(Decoder(dense_configs()[family]).to(dtype), 0.1)
    save_model(seed, folder / "seed", tokenizer=tokenizer)
    paths = {}
    for name in names:
        paths[name] = folder / name
        branch = Decoder(seed.config).to(dtype)
        branch.load_state_dict(seed.state_dict())
        save_model(noisy(branch, spread * 0.15), paths[name], tokenizer=tokenizer)
    return folder / "seed", paths


@torch.no_grad()
def noisy(model: Decoder, spread: float) -> Decoder:
    """Add random numbers to all parameters, also to norms and biases, which begin alike."""
    for parameter in model.parameters():
        parameter.add_(spread * torch.randn_like(parameter))
    return model.eval()
