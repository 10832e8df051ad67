"""FlexAttention with block masks that are built without the dense `time * time` mask.

Shape suffixes: b batch (1 without documents), t time, n tiles = time / 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLEX_FROM = 256
"""Shortest sequence for FlexAttention.

It skips tiles of 128 by 128, and a shorter sequence has none to skip.
"""

FLEX_TILE = 128
"""Queries, and keys, of a tile of the block mask."""
FLEX_SMALLEST_HEAD = 16
"""Smallest `head_dim` that FlexAttention's kernel takes."""


def visible(window: int | None, document_starts: Tensor | None) -> Callable[[Any, Any, Any, Any], Any]:
    """Return FlexAttention's mask function: causal, within the window, within the document."""

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document_starts is not None:
            seen = seen & (key >= document_starts[batch, query])
        return seen

    return mask


def block_mask(time: int, window: int | None, document_starts: Tensor | None, device: torch.device) -> Any:
    """Build FlexAttention's `BlockMask` of `visible`, without the `time * time` mask.

    A query sees one range of keys, `[first(query), query]`, and `first` never decreases from one query to the
    next. So the tiles that a tile of queries needs lie between the `first` of its first query and the
    diagonal. The tiles from the `first` of its last query up to the diagonal are fully visible.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first_bt = torch.zeros(1, time, dtype=torch.long, device=device)
    if window is not None:
        first_bt = (torch.arange(time, device=device)[None] - window + 1).clamp(min=0)
    if document_starts is not None:
        first_bt = torch.maximum(first_bt, document_starts)
    last = torch.arange(FLEX_TILE - 1, time + FLEX_TILE - 1, FLEX_TILE, device=device).clamp(max=time - 1)
    lowest = first_bt[:, ::FLEX_TILE, None]
    highest = first_bt[:, last, None]
    tiles = torch.arange(last.numel(), device=device)
    begin = tiles * FLEX_TILE
    earlier = tiles[None, :] < tiles[:, None]
    full_bnn = earlier & (begin >= highest)
    partial_bnn = (tiles[None, :] <= tiles[:, None]) & (begin + FLEX_TILE > lowest) & ~full_bnn

    def counts_and_indices(dense_bnn: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many tiles each row of tiles has, and the indices of the tiles, those first."""
        order = dense_bnn.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return dense_bnn.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *counts_and_indices(partial_bnn),
        *counts_and_indices(full_bnn),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=visible(window, document_starts),
        seq_lengths=(time, time),
    )


@functools.lru_cache(maxsize=16)
def _window_mask(time: int, window: int | None, device: torch.device) -> Any:
    # Without documents every layer and every step has the same mask. Its tensors are ordinary ones even if it
    # is first built in inference mode: training uses the same mask, and saves it for its backward pass.
    with torch.inference_mode(False):
        return block_mask(time, window, None, device)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def capped(softcap: float) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """Return FlexAttention's score function `softcap * tanh(score / softcap)`."""

    def score(value: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return torch.tanh(value / softcap) * softcap

    return score


def flex_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute FlexAttention with a block mask; invisible tiles are skipped.

    The kernel is compiled on an accelerator. On CPU (tests) it runs uncompiled, forward only.

    Args:
        q: `[batch, heads, time, head_dim]`, scaled.
        k, v: `[batch, kv_heads, time, head_dim]`.
        window: see `LayerSpec.window`.
        document_starts: `[batch, time]`, the position at which each position's document begins.
        softcap: see `koine.model.attention.dispatch.attend`.

    Returns:
        `[batch, heads, time, head_dim]`.
    """
    from torch.nn.attention.flex_attention import flex_attention

    time = q.shape[2]
    if document_starts is None:
        mask = _window_mask(time, window, q.device)
    else:
        mask = block_mask(time, window, document_starts, q.device)
    kernel = flex_attention if q.device.type == "cpu" else _compiled_flex()
    score = None if softcap is None else capped(softcap)
    out = kernel(q, k, v, score_mod=score, block_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out
