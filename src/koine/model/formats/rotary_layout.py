"""Two orders of the entries of a head: RoPE rotates neighbours, or entry i with entry i + rotary_dim / 2.

Our decoder rotates neighbours, and most classes of `transformers` halves. Reordering the rows of the
projections to q and k, with their biases and norms, changes no product of q and k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from koine.model.config import ModelConfig

ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")
"""Modules whose rows are entries of heads that are rotated."""


def is_rotated(module: str) -> bool:
    """Return whether the rows of a module's tensors are entries of rotated heads."""
    return module.rpartition(".")[2] in ROTATED


def pairs_from_halves(tensor: Tensor, config: ModelConfig, *, norm: bool) -> Tensor:
    """Reorder rows from `0, r/2, 1, r/2 + 1, ...` of halves to neighbours; r is the rotary size.

    Args:
        tensor: rows `[heads * head_dim, ...]`; a norm's `[head_dim]` or `[heads, head_dim]`.
        config: sizes.
        norm: the tensor is the gain of a norm.
    """
    return _reordered(tensor, config, (2, -1), norm=norm)


def halves_from_pairs(tensor: Tensor, config: ModelConfig, *, norm: bool) -> Tensor:
    """Undo `pairs_from_halves`."""
    return _reordered(tensor, config, (-1, 2), norm=norm)


def _reordered(tensor: Tensor, config: ModelConfig, split: tuple[int, int], *, norm: bool) -> Tensor:
    size, rotary = config.head_dim, config.rotary_dim or config.head_dim
    heads = torch.unflatten(tensor.flatten() if norm else tensor, 0, (-1, size))
    rotated = torch.unflatten(heads[:, :rotary], 1, split).transpose(1, 2).flatten(1, 2)
    return torch.cat((rotated, heads[:, rotary:]), dim=1).view_as(tensor)
