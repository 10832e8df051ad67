"""Attention of one new token of each sequence to keys that lie in parts (pages, runs of pages, rings), and how parts of one sequence meet."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30
"""Added to the score of a key that is not seen. Finite: a part of which nothing is seen gets a weight of 0 when parts meet, and not NaN."""


def mask_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, `[parts, 1, 1, keys]`, from which keys are `hidden` `[parts, keys]`."""
    lowest = max(HIDDEN, torch.finfo(dtype).min / 2)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, lowest)[
        :, None, None
    ]


def partial_attention(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of each q `[parts, kv_heads, groups, head_dim]` (scaled) to its own keys and values `[parts, kv_heads, keys, head_dim]`.

    added: see `mask_bias`; None: everything is seen. Returns the same shape as q, and the logarithms `[parts, kv_heads, groups]` of the
    sums of the exponentials, in float32.
    """
    if q.device.type != "cpu":
        return by_products(q, keys, values, added)
    # The fused kernel reads keys where they lie, whatever the strides: 256 of them in 15 µs, where products and a softmax take 19, in bfloat16 60 (docs/explanation/log.md).
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mixed, log_sum = fused(q, keys, values, 0.0, False, attn_mask=added, scale=1.0)
    return mixed, log_sum


def by_products(q: Tensor, keys: Tensor, values: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """`partial_attention` for any device. Where parts and heads lie apart, as in a slab, a head at a time: one product over both would copy the keys."""
    apart = keys.stride(0) != keys.shape[1] * keys.stride(1)
    product = _by_heads if apart else torch.matmul
    scores = product(q, keys.transpose(-1, -2)).float()
    if added is not None:
        scores += added
    log_sum = scores.logsumexp(dim=-1)
    weights = (scores - log_sum[..., None]).exp_()
    return product(weights.to(q.dtype), values), log_sum


def _by_heads(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([torch.bmm(a[:, head], b[:, head]) for head in range(a.shape[1])], dim=1)


def merge_attention_states(mixed: Tensor, log_sums: Tensor, rows: Tensor, count: int) -> Tensor:
    """The parts of each of `count` rows as one, `[count, kv_heads, groups, head_dim]`, in the dtype of `mixed`.

    mixed, log_sums: of all parts, see `partial_attention`; rows: `[parts]`, whose each is. Every row has a part of which something is seen.
    """
    sums = log_sums[..., None]
    highest = torch.full((count, *sums.shape[1:]), -torch.inf, dtype=sums.dtype, device=sums.device)
    highest.scatter_reduce_(0, rows[:, None, None, None].expand_as(sums), sums, "amax")
    weights = (sums - highest[rows]).exp_()
    total = torch.zeros_like(highest).index_add_(0, rows, weights)
    whole = torch.zeros((count, *mixed.shape[1:]), dtype=sums.dtype, device=sums.device)
    return (whole.index_add_(0, rows, mixed * weights) / total).to(mixed.dtype)
