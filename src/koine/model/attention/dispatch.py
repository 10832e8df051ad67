"""Attention as the decoder calls it: which kernel serves which case.

| case | kernel |
|---|---|
| CPU, a window much shorter than the text | `windowed_attention`: blocks through the fused kernel |
| CPU, full float32 attention without documents, of a long text or where nothing is learnt | fused SDPA |
| CPU, otherwise | `blocked_attention` |
| accelerator, plain causal | fused SDPA |
| CUDA, a window or documents | FlexAttention with a block mask, where the text is long enough to have blocks to skip |
| accelerator, otherwise | SDPA under a mask |
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.model.attention.cpu_blocked import blocked_attention
from koine.model.attention.cpu_windowed import windowed_attention, windows_are_faster

FUSED_FROM = 1024
"""From this length on, full causal float32 attention on CPU is faster fused than in blocks where it has a backward pass; without, at any (docs/explanation/log.md)."""

FLEX_FROM = 256
"""FlexAttention skips tiles of 128 by 128: in a shorter text there is nothing to skip."""

FLEX_TILE = 128
FLEX_SMALLEST_HEAD = 16


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
    time, groups, head_dim = q.shape[1], q.shape[3], q.shape[4]
    if window is not None and window >= time:
        window = None
    plain = window is None and document_starts is None
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    fused = plain and q.dtype == torch.float32 and (time >= FUSED_FROM or not torch.is_grad_enabled())
    if q.device.type == "cpu" and not fused:
        mixed: Tensor = _on_cpu(q, keys, values, window=window, document_starts=document_starts)
        return mixed
    heads = q.flatten(2, 3).transpose(1, 2)
    if plain:
        out = F.scaled_dot_product_attention(
            heads, keys, values, is_causal=True, scale=1.0, enable_gqa=groups > 1
        )
    elif q.device.type == "cuda" and time >= FLEX_FROM and head_dim >= FLEX_SMALLEST_HEAD:
        out = flex_attend(heads, keys, values, window=window, document_starts=document_starts)
    else:
        out = masked_attend(heads, keys, values, window=window, document_starts=document_starts)
    return out.transpose(1, 2).flatten(2)


def attend_after(q: Tensor, k: Tensor, v: Tensor, *, window: int | None) -> Tensor:
    """Attention of new positions over earlier ones and themselves.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled; its rows are the last `time` of the positions.
        k, v: `[batch, kv_heads, positions, head_dim]`.
        window: see `LayerSpec.window`.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    if q.device.type == "cpu":
        if window is None and k.shape[2] > q.shape[1] and not torch.is_grad_enabled():
            return _earlier_and_own(q, k, v)
        after: Tensor = _on_cpu(q, k, v, window=window, document_starts=None)
        return after
    heads = q.flatten(2, 3).transpose(1, 2)
    out = masked_attend(heads, k, v, window=window, document_starts=None)
    return out.transpose(1, 2).flatten(2)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it without types
def _on_cpu(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, document_starts: Tensor | None) -> Tensor:
    """Windowed or blocked attention of q `[batch, time, kv_heads, groups, head_dim]` over k and v `[batch, kv_heads, positions, head_dim]`."""
    if window is not None and windows_are_faster(q, k, window, document_starts):
        return windowed_attention(q, k, v, window=window, document_starts=document_starts).flatten(2)
    return _in_blocks(q, k, v, window=window, document_starts=document_starts)


def _in_blocks(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, document_starts: Tensor | None
) -> Tensor:
    """`blocked_attention` of q `[batch, time, kv_heads, groups, head_dim]` over k and v `[batch, kv_heads, positions, head_dim]`."""
    batch, time, kv_heads, groups, head_dim = q.shape
    rows, positions = batch * kv_heads, k.shape[2]
    out = blocked_attention(
        q.permute(0, 2, 1, 3, 4).reshape(rows, time * groups, head_dim),
        k.reshape(rows, positions, head_dim),
        v.reshape(rows, positions, head_dim),
        before=positions - time,
        window=window,
        document_starts=document_starts,
    )
    laid_out: Tensor = out.view(batch, kv_heads, time, groups, head_dim).permute(0, 2, 1, 3, 4)
    return laid_out.reshape(batch, time, kv_heads * groups * head_dim)


def _earlier_and_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_after` without a window by the fused kernel of the CPU, which knows no causal mask that begins later: once over the earlier positions, of
    which all is seen, once over the new ones, and the two mixed by the sums of their exponentials, which the kernel gives (it has no gradient here).

    Blocks of scores over 32,768 positions do not stay in the caches: 2,048 new ones took 1.7 s in float32, this 0.4 s (docs/explanation/log.md).
    """
    batch, time, kv_heads, groups, head_dim = q.shape
    before = k.shape[2] - time
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows = q.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, time * groups, head_dim)
    earlier, earlier_sum = fused(rows, k[:, :, :before], v[:, :, :before], 0.0, False, scale=1.0)
    own_k, own_v = (part[:, :, before:].repeat_interleave(groups, dim=1) for part in (k, v))
    own, own_sum = fused(q.flatten(2, 3).transpose(1, 2), own_k, own_v, 0.0, True, scale=1.0)
    earlier = earlier.view(batch, kv_heads, time, groups, head_dim).permute(0, 2, 1, 3, 4)
    earlier_sum = earlier_sum.view(batch, kv_heads, time, groups).permute(0, 2, 1, 3)
    own = own.transpose(1, 2).view(batch, time, kv_heads, groups, head_dim)
    own_sum = own_sum.transpose(1, 2).reshape(batch, time, kv_heads, groups)
    share = torch.sigmoid(earlier_sum - own_sum)[..., None]
    wide = torch.promote_types(q.dtype, torch.float32)
    mixed = own.to(wide).lerp(earlier.to(wide), share.to(wide))
    result: Tensor = mixed.to(q.dtype).reshape(batch, time, kv_heads * groups * head_dim)
    return result


def masked_attend(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, document_starts: Tensor | None
) -> Tensor:
    """SDPA under a dense mask: q `[batch, heads, time, head_dim]` are the last `time` positions of k and v
    `[batch, kv_heads, positions, head_dim]`; `document_starts` `[batch, time]` as in `attend`."""
    time, positions = q.shape[2], k.shape[2]
    key = torch.arange(positions, device=q.device)
    query = key[positions - time :, None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if document_starts is not None:
        mask = (mask & (key >= document_starts[..., None]))[:, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    )


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


def document_starts_of(document_ids: Tensor) -> Tensor:
    """Where each position's document begins, `[batch, time]` int64, from ids that are equal within a document.

    Padding (id -1) begins at itself: it sees nothing but itself.
    """
    time = document_ids.shape[1]
    positions = torch.arange(time, device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]) | (document_ids[:, 1:] < 0)
    return torch.where(begins, positions, 0).cummax(dim=1).values
