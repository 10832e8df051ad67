"""Attention as the decoder calls it: which kernel is used when.

| case | kernel |
|---|---|
| CPU, a window much shorter than the sequence | `windowed_attention`: blocks through the fused kernel |
| CPU, full attention without documents, of a long sequence | `fused_attention`: SDPA's kernel |
| CPU, full float32 attention without documents or gradients | fused SDPA |
| CPU, otherwise | `blocked_attention` |
| accelerator, plain causal | fused SDPA |
| CUDA, a window or documents, if the sequence has blocks to skip | FlexAttention with a block mask |
| accelerator, otherwise | SDPA with a dense mask |
| soft-capped scores | `blocked_attention` on CPU, FlexAttention on CUDA, else plain matmuls |

Shape suffixes: b batch, t time (queries), s positions (keys), k kv_heads, g groups (query heads of one key
    head), h heads = k * g, d head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.model.attention.cpu_blocked import blocked_attention
from koine.model.attention.cpu_fused import fused_attention, threads_idle
from koine.model.attention.cpu_windowed import windowed_attention, windows_are_faster
from koine.model.attention.flex import FLEX_FROM, FLEX_SMALLEST_HEAD, flex_attend
from koine.model.uncompiled import uncompiled

FUSED_FROM, FUSED_FROM_BFLOAT16 = 1024, 4096
"""Length from which full causal attention on CPU with a backward pass is faster fused than in blocks.

In float32 it is faster at any length without a backward pass, in bfloat16 only with heads smaller than
`BLOCKED_HEAD` (docs/explanation/log.md).
"""

BLOCKED_HEAD = 64
"""Size of a head from which blocks are faster in bfloat16 at any length."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute causal attention over whole sequences.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled by `head_dim ** -0.5`.
        k, v: `[batch, time, kv_heads, head_dim]`.
        window: see `LayerSpec.window`; a window of at least `time` is the same as none.
        document_starts: `[batch, time]`, the position at which each position's document begins.
        softcap: scores become `softcap * tanh(scores / softcap)`; None leaves them.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    time, groups, head_dim = q.shape[1], q.shape[3], q.shape[4]
    if window is not None and window >= time:
        window = None
    plain = window is None and document_starts is None and softcap is None
    k_bksd, v_bksd = k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and not (plain and _fused_is_faster(q)):
        on_cpu: Tensor = _attend_on_cpu(
            q, k_bksd, v_bksd, window=window, document_starts=document_starts, softcap=softcap
        )
        return on_cpu
    q_bhtd = q.flatten(2, 3).transpose(1, 2)
    if plain and q.device.type == "cpu" and torch.is_grad_enabled() and threads_idle(k_bksd, groups):
        out_bhtd = fused_attention(q_bhtd, k_bksd, v_bksd)
    elif plain:
        out_bhtd = F.scaled_dot_product_attention(
            q_bhtd, k_bksd, v_bksd, is_causal=True, scale=1.0, enable_gqa=groups > 1
        )
    elif q.device.type == "cuda" and time >= FLEX_FROM and head_dim >= FLEX_SMALLEST_HEAD:
        out_bhtd = flex_attend(
            q_bhtd, k_bksd, v_bksd, window=window, document_starts=document_starts, softcap=softcap
        )
    else:
        out_bhtd = masked_attend(
            q_bhtd, k_bksd, v_bksd, window=window, document_starts=document_starts, softcap=softcap
        )
    return out_bhtd.transpose(1, 2).flatten(2)


def _fused_is_faster(q: Tensor) -> bool:
    """Return whether SDPA's kernel computes full causal attention of `q` `[batch, time, ...]` faster on CPU."""
    if q.dtype == torch.bfloat16:
        long, small = q.shape[1] >= FUSED_FROM_BFLOAT16, q.shape[-1] < BLOCKED_HEAD
        return torch.is_grad_enabled() and long and small
    return q.dtype == torch.float32 and (q.shape[1] >= FUSED_FROM or not torch.is_grad_enabled())


def attend_cached(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None = None
) -> Tensor:
    """Compute attention of new positions over cached ones and themselves.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled; its rows are the last `time` of the positions.
        k, v: `[batch, kv_heads, positions, head_dim]`.
        window: see `LayerSpec.window`.
        softcap: as in `attend`.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    if q.device.type == "cpu":
        later = window is None and softcap is None and k.shape[2] > q.shape[1]
        if later and not torch.is_grad_enabled():
            return _attend_cache_and_new(q, k, v)
        on_cpu: Tensor = _attend_on_cpu(q, k, v, window=window, document_starts=None, softcap=softcap)
        return on_cpu
    q_bhtd = q.flatten(2, 3).transpose(1, 2)
    out_bhtd = masked_attend(q_bhtd, k, v, window=window, document_starts=None, softcap=softcap)
    return out_bhtd.transpose(1, 2).flatten(2)


@uncompiled
def _attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Compute windowed or blocked attention.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`.
        k, v: `[batch, kv_heads, positions, head_dim]`.
        window, document_starts, softcap: as in `attend`.

    Returns:
        `[batch, time, kv_heads * groups * head_dim]`.
    """
    if window is not None and softcap is None and windows_are_faster(q, k, window, document_starts):
        return windowed_attention(q, k, v, window=window, document_starts=document_starts).flatten(2)
    return _attend_in_blocks(q, k, v, window=window, document_starts=document_starts, softcap=softcap)


def _attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    """Compute `blocked_attention`; shapes as in `_attend_on_cpu`."""
    batch, time, kv_heads, groups, head_dim = q.shape
    rows, positions = batch * kv_heads, k.shape[2]
    out = blocked_attention(
        q.permute(0, 2, 1, 3, 4).reshape(rows, time * groups, head_dim),
        k.reshape(rows, positions, head_dim),
        v.reshape(rows, positions, head_dim),
        past=positions - time,
        window=window,
        document_starts=document_starts,
        softcap=softcap,
    )
    out_btkgd: Tensor = out.view(batch, kv_heads, time, groups, head_dim).permute(0, 2, 1, 3, 4)
    return out_btkgd.reshape(batch, time, kv_heads * groups * head_dim)


def _attend_cache_and_new(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute `attend_cached` without a window by two calls of the CPU's fused kernel.

    The kernel has no causal mask that begins later. One call attends to the cached positions, all of them
    visible; one attends to the new ones. The two results are combined by log-sum-exp, which the kernel
    returns. The kernel has no gradient here.

    Blocks of scores over 32,768 positions do not stay in the processor's caches: 2,048 new positions took 1.7
    s in float32, this 0.4 s (docs/explanation/log.md).
    """
    batch, time, kv_heads, groups, head_dim = q.shape
    past = k.shape[2] - time
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows = q.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, time * groups, head_dim)
    cached, cached_lse = fused(rows, k[:, :, :past], v[:, :, :past], 0.0, False, scale=1.0)
    new_k, new_v = (tensor[:, :, past:].repeat_interleave(groups, dim=1) for tensor in (k, v))
    new, new_lse = fused(q.flatten(2, 3).transpose(1, 2), new_k, new_v, 0.0, True, scale=1.0)
    cached_btkgd = cached.view(batch, kv_heads, time, groups, head_dim).permute(0, 2, 1, 3, 4)
    cached_lse_btkg = cached_lse.view(batch, kv_heads, time, groups).permute(0, 2, 1, 3)
    new_btkgd = new.transpose(1, 2).view(batch, time, kv_heads, groups, head_dim)
    new_lse_btkg = new_lse.transpose(1, 2).reshape(batch, time, kv_heads, groups)
    cached_share = torch.sigmoid(cached_lse_btkg - new_lse_btkg)[..., None]
    upcast = torch.promote_types(q.dtype, torch.float32)
    out = new_btkgd.to(upcast).lerp(cached_btkgd.to(upcast), cached_share.to(upcast))
    result: Tensor = out.to(q.dtype).reshape(batch, time, kv_heads * groups * head_dim)
    return result


def masked_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute attention with a dense mask, by SDPA where scores are not capped.

    Args:
        q: `[batch, heads, time, head_dim]`, the last `time` of the positions.
        k, v: `[batch, kv_heads, positions, head_dim]`.
        window: see `LayerSpec.window`.
        document_starts: `[batch, time]`, as in `attend`.
        softcap: as in `attend`.
        mask: what each query sees, bool, broadcast to `[batch, heads, time, positions]`, in place of causal
            visibility, the window and the documents.

    Returns:
        `[batch, heads, time, head_dim]`.
    """
    if mask is None:
        mask = _causal_mask(q.shape[2], k.shape[2], window, document_starts, q.device)
    if softcap is not None:
        groups = q.shape[1] // k.shape[1]
        keys, values = (one.repeat_interleave(groups, dim=1) for one in (k, v))
        scores = torch.tanh(q @ keys.transpose(-1, -2) / softcap) * softcap
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1, dtype=torch.float32)
        return weights.to(q.dtype) @ values
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1]
    )


def _causal_mask(
    time: int, positions: int, window: int | None, document_starts: Tensor | None, device: torch.device
) -> Tensor:
    """Return what each of the last `time` positions sees, bool `[time, positions]` or `[batch, 1, ...]`."""
    key = torch.arange(positions, device=device)
    query = key[positions - time :, None]
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    if document_starts is not None:
        mask = (mask & (key >= document_starts[..., None]))[:, None]
    return mask


def document_starts_of(document_ids: Tensor) -> Tensor:
    """Return where each position's document begins, `[batch, time]` int64.

    Args:
        document_ids: `[batch, time]`, equal within a document. Padding has -1; each padded position is a
            document of its own, so it sees only itself.
    """
    time = document_ids.shape[1]
    positions = torch.arange(time, device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]) | (document_ids[:, 1:] < 0)
    return torch.where(begins, positions, 0).cummax(dim=1).values
