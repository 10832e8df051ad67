"""Attention as the decoder calls it: which kernel serves which case.

| case | kernel |
|---|---|
| training or a whole text on CPU | `blocked_attention`; full float32 attention without documents: fused SDPA |
| the same on an accelerator | fused SDPA where plain causal, else FlexAttention with a block mask |
| a few new positions after a cache | fused SDPA over what the cache holds |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.model.blocked_attention import blocked_attention

FUSED_FROM = 1024
"""From this length on, full causal float32 attention on CPU is faster fused than in blocks (docs/log.md)."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
) -> Tensor:
    """Causal attention over whole sequences.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled by `head_dim ** -0.5`.
        k, v: `[batch, time, kv_heads, head_dim]`.
        window: see `LayerSpec.window`; a window of at least `time` is the same as none.
        document_starts: `[batch, time]`, the position at which each position's document begins.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    batch, time, kv_heads, groups, head_dim = q.shape
    if window is not None and window >= time:
        window = None
    plain = window is None and document_starts is None
    if q.device.type == "cpu" and not (plain and q.dtype == torch.float32 and time >= FUSED_FROM):
        out: Tensor = blocked_attention(
            q.permute(0, 2, 1, 3, 4).reshape(batch * kv_heads, time * groups, head_dim),
            k.permute(0, 2, 1, 3).reshape(batch * kv_heads, time, head_dim),
            v.permute(0, 2, 1, 3).reshape(batch * kv_heads, time, head_dim),
            window=window,
            document_starts=document_starts,
        )
        laid_out = out.view(batch, kv_heads, time, groups, head_dim).permute(0, 2, 1, 3, 4)
        return laid_out.reshape(batch, time, kv_heads * groups * head_dim)
    heads = q.flatten(2, 3).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if plain:
        out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=1.0, enable_gqa=groups > 1)
    else:
        out = flex_attend(*heads, window=window, document_starts=document_starts)
    return out.transpose(1, 2).reshape(batch, time, kv_heads * groups * head_dim)


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, first_position: int, padding: Tensor
) -> Tensor:
    """Attention of new positions over what a layer's cache holds, `positions = cached + time`.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled; its rows are the last `time` of the positions.
        k, v: `[batch, kv_heads, positions, head_dim]`.
        first_position: index in the padded sequence of the first cached position.
        padding: `[batch]`, leading positions of the padded sequence that nobody may see.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    batch, time, kv_heads, groups, head_dim = q.shape
    positions = k.shape[2]
    mask = None
    padded = bool((padding > first_position).any())
    if time > 1 or padded or (window is not None and positions > window):
        key = torch.arange(first_position, first_position + positions, device=q.device)
        query = key[positions - time :]
        mask = key[None, :] <= query[:, None]
        if window is not None:
            mask &= key[None, :] > query[:, None] - window
        if padded:
            # A padding row sees itself, so that its softmax has a key; nothing reads its output.
            seen = (key[None, None, :] >= padding[:, None, None]) | (
                key[None, None, :] == query[None, :, None]
            )
            mask = (mask & seen)[:, None]
        else:
            mask = mask[None, None]
    heads = q.flatten(2, 3).transpose(1, 2)
    out = F.scaled_dot_product_attention(heads, k, v, attn_mask=mask, scale=1.0, enable_gqa=groups > 1)
    return out.transpose(1, 2).reshape(batch, time, kv_heads * groups * head_dim)


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
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, heads, time, _ = q.shape
    block_mask = create_block_mask(
        visible(window, document_starts),
        batch if document_starts is not None else None,
        None,
        time,
        time,
        device=q.device.type,
    )
    kernel = flex_attention if q.device.type == "cpu" else _compiled_flex()
    out = kernel(q, k, v, block_mask=block_mask, scale=1.0, enable_gqa=heads != k.shape[1])
    assert isinstance(out, Tensor)
    return out


def document_starts_of(document_ids: Tensor) -> Tensor:
    """Where each position's document begins, `[batch, time]` int64, from ids that are equal within a document.

    Padding (id -1) begins at itself: it sees nothing but itself.
    """
    time = document_ids.shape[1]
    positions = torch.arange(time, device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]) | (document_ids[:, 1:] < 0)
    return torch.where(begins, positions, 0).cummax(dim=1).values
