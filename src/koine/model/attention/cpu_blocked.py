"""Causal, windowed and document-masked attention on CPU, in blocks of queries, forward and backward.

The fused `scaled_dot_product_attention` on CPU computes the full square of scores under a window or a
document mask, and in bfloat16 its inner products are far slower than a batched matmul. Here, each block of
queries is two batched matmuls around a softmax, against the keys that some query of the block may see. The
backward pass recomputes the probabilities, so memory grows with `block * keys`, not with `time * time`.

Shape suffixes: r rows = batch * kv_heads, q queries = time * groups, s keys = past + time, d head_dim.
The queries of one key head are adjacent (`time`, then `groups`), so GQA copies no keys. `past` counts cached
positions (0 in training). Queries are scaled by `head_dim ** -0.5`. Positions count keys from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK, BLOCK_BFLOAT16 = 64, 128
"""Queries of a block; the second of a full layer in bfloat16.

Larger ones are fewer operations, but compute more scores that nobody sees (docs/explanation/log.md).
"""


class Span(NamedTuple):
    """The queries at positions `[start, end)` and the keys `[first_key, end)` that they may see.

    documents: whether a document begins after `first_key` for some query, so that its mask is needed.
    """

    start: int
    end: int
    first_key: int
    documents: bool


def spans(
    past: int, time: int, window: int | None, document_starts: Tensor | None, block: int
) -> Iterator[Span]:
    """Yield the blocks that cover positions `[past, past + time)`.

    Keys outside every window and document of a block are left out.
    `document_starts` `[batch, time]` is the position at which each query's document begins.
    """
    if document_starts is not None:
        padded = torch.nn.functional.pad(document_starts, (0, -time % block), mode="replicate")
        blocks = padded.view(padded.shape[0], -1, block)
        earliest = blocks.amin(dim=(0, 2)).tolist()
        latest = blocks.amax(dim=(0, 2)).tolist()
    for index, start in enumerate(range(past, past + time, block)):
        first_key = 0 if window is None else max(0, start - window + 1)
        documents = False
        if document_starts is not None:
            first_key = max(first_key, earliest[index])
            documents = latest[index] > first_key
        yield Span(start, min(past + time, start + block), first_key, documents)


def _rows(span: Span, past: int, groups: int) -> slice:
    return slice((span.start - past) * groups, (span.end - past) * groups)


def _probabilities(
    q: Tensor,
    k: Tensor,
    span: Span,
    past: int,
    window: int | None,
    document_starts: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the softmax over the visible keys, `[batch * kv_heads, block * groups, keys]`.

    With a soft cap also its derivative, of the same shape.
    """
    start, end, first_key, documents = span
    groups = q.shape[1] // (k.shape[1] - past)
    scores_rqs = torch.bmm(q[:, _rows(span, past, groups)], k[:, first_key:end].transpose(1, 2))
    slope_rqs = None
    if softcap is not None:
        shares_rqs = scores_rqs.div_(softcap).tanh_()
        slope_rqs = 1 - shares_rqs.square()
        scores_rqs = shares_rqs.mul_(softcap)
    rows = torch.arange(start, end, device=q.device).repeat_interleave(groups)[:, None]
    columns = torch.arange(first_key, end, device=q.device)[None, :]
    if end - start > 1:
        # Only the last block of columns can be later than a query.
        diagonal = start - first_key
        scores_rqs[:, :, diagonal:].masked_fill_(columns[:, diagonal:] > rows, -torch.inf)
    if window is not None and end - window > first_key:
        # Only the first columns can be earlier than its window.
        earlier = min(end - window - first_key, end - first_key)
        scores_rqs[:, :, :earlier].masked_fill_(columns[:, :earlier] <= rows - window, -torch.inf)
    if documents:
        assert document_starts is not None
        batch = document_starts.shape[0]
        starts = document_starts[:, None, start - past : end - past].repeat_interleave(groups, dim=2)[
            ..., None
        ]
        scores_rqs.view(batch, -1, *scores_rqs.shape[1:]).masked_fill_(columns < starts, -torch.inf)
    return torch.softmax(scores_rqs, dim=-1), slope_rqs


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: int,
        window: int | None,
        document_starts: Tensor | None,
        block: int,
        softcap: float | None,
    ) -> Tensor:
        time = k.shape[1] - past
        groups = q.shape[1] // time
        out = torch.empty_like(q)
        for span in spans(past, time, window, document_starts, block):
            probabilities, _ = _probabilities(q, k, span, past, window, document_starts, softcap)
            out[:, _rows(span, past, groups)] = torch.bmm(probabilities, v[:, span.first_key : span.end])
        ctx.save_for_backward(q, k, v, document_starts)
        ctx.past, ctx.window, ctx.block, ctx.softcap = past, window, block, softcap
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, document_starts = ctx.saved_tensors
        past = ctx.past
        time = k.shape[1] - past
        groups = q.shape[1] // time
        grad_out = grad_out.contiguous()
        grad_q = torch.empty_like(q)
        # Many blocks contribute to the gradient of a key: they are summed in float32 for any input dtype.
        total = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(k, dtype=total) for _ in range(2))
        for span in spans(past, time, ctx.window, document_starts, ctx.block):
            rows = _rows(span, past, groups)
            keys = slice(span.first_key, span.end)
            probabilities, slope = _probabilities(q, k, span, past, ctx.window, document_starts, ctx.softcap)
            grad_v[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad_out[:, rows])
            grad_probabilities = torch.bmm(grad_out[:, rows], v[:, keys].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            if slope is not None:
                grad_scores = grad_scores.mul_(slope)
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, keys])
            grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None, None


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    past: int = 0,
    window: int | None = None,
    document_starts: Tensor | None = None,
    block: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention of every position to itself and the earlier ones of its window and document.

    Args:
        q: `[batch * kv_heads, time * groups, head_dim]`, scaled by `head_dim ** -0.5`.
        k, v: `[batch * kv_heads, past + time, head_dim]`.
        past: count of cached keys, before the first query.
        window: a position sees itself and the `window - 1` before it (`None`: all before it).
        document_starts: `[batch, time]` int64, the position at which each query's document begins. At most
            the query's own, so that every row of the softmax has a key (padding begins at itself).
        block: queries of a block; `time` need not be a multiple of it. None: the fastest.
        softcap: scores become `softcap * tanh(scores / softcap)` before the softmax (Gemma-2).

    Returns:
        `[batch * kv_heads, time * groups, head_dim]` in the dtype of `q`. In bfloat16 the scores are rounded
        to bfloat16 before the softmax, which is computed in float32.
    """
    if block is None:
        block = BLOCK_BFLOAT16 if q.dtype == torch.bfloat16 and window is None else BLOCK
    result = _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, past, window, document_starts, block, softcap
    )
    assert isinstance(result, Tensor)
    return result
