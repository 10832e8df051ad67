"""FlexAttention with block masks that are made without the dense `time * time` mask."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLEX_FROM = 256
"""FlexAttention skips tiles of 128 by 128: in a shorter text there is nothing to skip."""

FLEX_TILE = 128
FLEX_SMALLEST_HEAD = 16


def visible(window: int | None, document_starts: Tensor | None) -> Callable[[Any, Any, Any, Any], Any]:
    """FlexAttention's mask function: causal, within the window, within the document."""

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        if document_starts is not None:
            seen = seen & (key >= document_starts[batch, query])
        return seen

    return mask


def block_mask(time: int, window: int | None, document_starts: Tensor | None, device: torch.device) -> Any:
    """FlexAttention's `BlockMask` of `visible`, without ever forming the `time * time` mask.

    A query sees one run of keys, `[first(query), query]`, and `first` never falls from one query to the next: the tiles that a
    tile of queries needs lie between the `first` of its first query and the diagonal, and those from the `first` of its last
    query up to the diagonal are seen whole.
    """
    from torch.nn.attention.flex_attention import BlockMask

    first = torch.zeros(1, time, dtype=torch.long, device=device)
    if window is not None:
        first = (torch.arange(time, device=device)[None] - window + 1).clamp(min=0)
    if document_starts is not None:
        first = torch.maximum(first, document_starts)
    last = torch.arange(FLEX_TILE - 1, time + FLEX_TILE - 1, FLEX_TILE, device=device).clamp(max=time - 1)
    lowest = first[:, ::FLEX_TILE, None]
    highest = first[:, last, None]
    tiles = torch.arange(last.numel(), device=device)
    begin = tiles * FLEX_TILE
    behind = tiles[None, :] < tiles[:, None]
    whole = behind & (begin >= highest)
    part = (tiles[None, :] <= tiles[:, None]) & (begin + FLEX_TILE > lowest) & ~whole

    def ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
        """How many tiles each row of tiles has, and which, first."""
        order = dense.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return dense.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *ordered(part),
        *ordered(whole),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=visible(window, document_starts),
        seq_lengths=(time, time),
    )


@functools.lru_cache(maxsize=16)
def _window_mask(time: int, window: int | None, device: torch.device) -> Any:
    # Without documents every layer and every step has the same one. Ordinary tensors even where it is first asked for in inference
    # mode: training asks for the same one, and saves it for its backward pass.
    with torch.inference_mode(False):
        return block_mask(time, window, None, device)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_attend(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, document_starts: Tensor | None
) -> Tensor:
    """FlexAttention with a block mask, `[batch, heads, time, head_dim]`: work in proportion to what is visible.

    On an accelerator the kernel is compiled; on CPU (tests) it runs uncompiled, forward only.
    """
    from torch.nn.attention.flex_attention import flex_attention

    time = q.shape[2]
    if document_starts is None:
        mask = _window_mask(time, window, q.device)
    else:
        mask = block_mask(time, window, document_starts, q.device)
    kernel = flex_attention if q.device.type == "cpu" else _compiled_flex()
    out = kernel(q, k, v, block_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, Tensor)
    return out
