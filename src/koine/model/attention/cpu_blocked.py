"""Causal, windowed and document-masked attention on CPU, in blocks of queries, forward and backward.

Why not the fused `scaled_dot_product_attention`: its CPU kernel works through the full square of scores where a window or a
document mask is given, and in bfloat16 its inner products run far below the rate of a plain batched matmul. Here the scores
of one block of queries (against the keys that any of them may see, and no others) are two batched matmuls around a softmax;
the backward pass computes them again, so memory grows with `block * keys`, never with `time * time`.

Shapes: queries `[batch * kv_heads, time * groups, head_dim]` (the queries that share a key head lie side by side, so GQA needs no
copy of the keys), keys and values `[batch * kv_heads, before + time, head_dim]`, where `before` counts the positions read earlier
(a cache; 0 in training). Queries come already scaled by `head_dim ** -0.5`. Positions count keys from 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 64  # queries a block: the fastest of 64, 128, 256 at every length and window tried (docs/explanation/log.md)


class Span(NamedTuple):
    """The queries at positions `[start, end)` and the keys `[first_key, end)` that they may see."""

    start: int
    end: int
    first_key: int
    documents: bool  # whether a document begins after `first_key` for some query, so that the mask is needed


def spans(
    before: int, time: int, window: int | None, document_starts: Tensor | None, block: int
) -> Iterator[Span]:
    """The blocks that cover positions `[before, before + time)`; keys outside every window and document of a block are left out.

    `document_starts` `[batch, time]` is the position at which each query's document begins.
    """
    if document_starts is not None:
        padded = torch.nn.functional.pad(document_starts, (0, -time % block), mode="replicate")
        blocks = padded.view(padded.shape[0], -1, block)
        earliest = blocks.amin(dim=(0, 2)).tolist()
        latest = blocks.amax(dim=(0, 2)).tolist()
    for index, start in enumerate(range(before, before + time, block)):
        first_key = 0 if window is None else max(0, start - window + 1)
        documents = False
        if document_starts is not None:
            first_key = max(first_key, earliest[index])
            documents = latest[index] > first_key
        yield Span(start, min(before + time, start + block), first_key, documents)


def _rows(span: Span, before: int, groups: int) -> slice:
    return slice((span.start - before) * groups, (span.end - before) * groups)


def _probabilities(
    q: Tensor, k: Tensor, span: Span, before: int, window: int | None, document_starts: Tensor | None
) -> Tensor:
    """Softmax over the visible keys, `[batch * kv_heads, block * groups, keys]`."""
    start, end, first_key, documents = span
    groups = q.shape[1] // (k.shape[1] - before)
    scores = torch.bmm(q[:, _rows(span, before, groups)], k[:, first_key:end].transpose(1, 2))
    rows = torch.arange(start, end, device=q.device).repeat_interleave(groups)[:, None]
    columns = torch.arange(first_key, end, device=q.device)[None, :]
    if end - start > 1:
        # Only the last block of columns can lie in a query's future ...
        diagonal = start - first_key
        scores[:, :, diagonal:].masked_fill_(columns[:, diagonal:] > rows, -torch.inf)
    if window is not None and end - window > first_key:
        # ... and only the first few can lie before its window.
        behind = min(end - window - first_key, end - first_key)
        scores[:, :, :behind].masked_fill_(columns[:, :behind] <= rows - window, -torch.inf)
    if documents:
        assert document_starts is not None
        batch = document_starts.shape[0]
        starts = document_starts[:, None, start - before : end - before].repeat_interleave(groups, dim=2)[
            ..., None
        ]
        scores.view(batch, -1, *scores.shape[1:]).masked_fill_(columns < starts, -torch.inf)
    return torch.softmax(scores, dim=-1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        before: int,
        window: int | None,
        document_starts: Tensor | None,
        block: int,
    ) -> Tensor:
        time = k.shape[1] - before
        groups = q.shape[1] // time
        out = torch.empty_like(q)
        for span in spans(before, time, window, document_starts, block):
            probabilities = _probabilities(q, k, span, before, window, document_starts)
            out[:, _rows(span, before, groups)] = torch.bmm(probabilities, v[:, span.first_key : span.end])
        ctx.save_for_backward(q, k, v, document_starts)
        ctx.before, ctx.window, ctx.block = before, window, block
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, document_starts = ctx.saved_tensors
        before = ctx.before
        time = k.shape[1] - before
        groups = q.shape[1] // time
        grad_out = grad_out.contiguous()
        grad_q = torch.empty_like(q)
        # A key is met by many blocks: their contributions are summed in float32 whatever the inputs are.
        total = torch.promote_types(k.dtype, torch.float32)
        grad_k, grad_v = (torch.zeros_like(k, dtype=total) for _ in range(2))
        for span in spans(before, time, ctx.window, document_starts, ctx.block):
            rows = _rows(span, before, groups)
            keys = slice(span.first_key, span.end)
            probabilities = _probabilities(q, k, span, before, ctx.window, document_starts)
            grad_v[:, keys] += torch.bmm(probabilities.transpose(1, 2), grad_out[:, rows])
            grad_probabilities = torch.bmm(grad_out[:, rows], v[:, keys].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_probabilities, probabilities, -1, probabilities.dtype
            )
            grad_q[:, rows] = torch.bmm(grad_scores, k[:, keys])
            grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None, None


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    before: int = 0,
    window: int | None = None,
    document_starts: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Attention of every position to itself and the earlier ones of its window and document.

    Args:
        q: `[batch * kv_heads, time * groups, head_dim]`, scaled by `head_dim ** -0.5`, position-major (`time`, then `groups`).
        k, v: `[batch * kv_heads, before + time, head_dim]`.
        before: how many of the keys lie before the first query.
        window: a position sees itself and the `window - 1` before it (`None`: all before it).
        document_starts: `[batch, time]` int64, the position at which each query's document begins; at most the query's
            own, so that every row of the softmax has a key (padding points at itself).
        block: queries a block; any number, `time` need not be a multiple of it.

    Returns:
        `[batch * kv_heads, time * groups, head_dim]` in the dtype of `q`. In bfloat16 the scores are rounded to bfloat16 before
        the softmax, which itself is computed in float32.
    """
    result = _BlockedAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, before, window, document_starts, block
    )
    assert isinstance(result, Tensor)
    return result
