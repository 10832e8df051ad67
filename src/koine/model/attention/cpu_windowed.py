"""Sliding-window attention on CPU through the fused kernel of SDPA, forward and backward.

Under a mask the kernel computes the whole rectangle of scores. So it is given small rectangles: a block of
queries with the keys that some of them may see, all blocks of a sequence in one call. The keys of
neighbouring blocks overlap and are views. The mask of each block is the same band, except where a block
reaches before the sequence or across documents.

Shape suffixes: n blocks (of all rows of the batch), k kv_heads, q = BLOCK * groups queries (position-major),
s = window + BLOCK keys, d head_dim. Key `j` of a block is the position `window - j` before its first query,
so query `i` sees the keys `i < j <= i + window`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from koine.hardware import is_intel

BLOCK = 64
"""Queries of a block.

The fastest of 32, 64, 128, 256 from 520 to 8,192 positions (docs/explanation/log.md).
"""

MAX_WINDOW, MAX_WINDOW_WITH_DOCUMENTS = 512, 256
"""Largest windows, without and with documents, for which this is faster than `blocked_attention`.

The gradients of overlapping keys and the masks of documents grow with the window.
"""

MIN_WINDOWS = 4
"""Shortest sequence in windows for which this is faster, in a batch or with gradients.

The first blocks need masks of their own.
"""

BLOCKS_AT_ONCE = 32
"""Blocks of a call: the backward pass holds `(window + BLOCK) / BLOCK` gradients of each key at a time."""


class BlockRange(NamedTuple):
    """Blocks `[start, end)` and the bias of their scores.

    mask_bias: 0 or -inf, `[BLOCK * groups, keys]` for all blocks alike, or
        `[blocks, 1, BLOCK * groups, keys]`.
    """

    start: int
    end: int
    mask_bias: Tensor


def _mask_bias(visible: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return 0 where `visible` `[..., BLOCK, keys]` and -inf elsewhere, for `groups` query heads."""
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return bias.repeat_interleave(groups, dim=-2)


def _band(window: int) -> Tensor:
    """Return which keys of a block its queries see, `[BLOCK, window + BLOCK]`."""
    query, key = torch.arange(BLOCK)[:, None], torch.arange(window + BLOCK)
    return (key > query) & (key <= query + window)


@functools.lru_cache(maxsize=16)
def _plain_masks(window: int, groups: int, dtype: torch.dtype, past: int) -> tuple[Tensor, Tensor]:
    """Return the mask of most blocks, and those of the first blocks.

    The first blocks reach before the first of the `past` cached positions, where there are no keys.
    """
    # Ordinary tensors even if they are first needed in inference mode: training saves the same ones.
    with torch.inference_mode(False):
        band = _band(window)
        first = -(-max(0, window - 1 - past) // BLOCK)
        position = torch.arange(first)[:, None, None] * BLOCK - window + torch.arange(window + BLOCK)
        return _mask_bias(band, groups, dtype), _mask_bias(band & (position >= -past), groups, dtype)[:, None]


_document_masks: Any = WeakTensorKeyDictionary()
"""Masks by the tensor of document starts, which all layers of a forward pass and its backward pass share."""


def _masks_of_documents(starts: Tensor, window: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return the mask of every block of `starts` `[batch, time]`, the rows of the batch concatenated."""
    known: dict[tuple[int, int, torch.dtype], Tensor] = _document_masks.setdefault(starts, {})
    key = (window, groups, dtype)
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():
            padded = F.pad(starts, (0, -starts.shape[1] % BLOCK)).view(starts.shape[0], -1, BLOCK, 1)
            begin = torch.arange(padded.shape[1])[:, None, None] * BLOCK - window
            # Keys before the text have positions below 0, where no document begins.
            visible = _band(window) & (begin + torch.arange(window + BLOCK) >= padded)
            # Padded queries may see any key: a row without keys would be NaN.
            visible |= torch.arange(padded.shape[1] * BLOCK).view(-1, BLOCK, 1) >= starts.shape[1]
            known[key] = _mask_bias(visible.flatten(0, 1), groups, dtype)[:, None]
    return known[key]


def _block_ranges(
    batch: int,
    blocks: int,
    *,
    window: int,
    groups: int,
    dtype: torch.dtype,
    past: int,
    starts: Tensor | None,
) -> Iterator[BlockRange]:
    """Yield all blocks of a batch, in order."""

    def split(start: int, end: int, bias: Tensor) -> Iterator[BlockRange]:
        for at in range(start, end, BLOCKS_AT_ONCE):
            to = min(end, at + BLOCKS_AT_ONCE)
            yield BlockRange(at, to, bias if bias.dim() == 2 else bias[at - start : to - start])

    if starts is not None:
        yield from split(0, batch * blocks, _masks_of_documents(starts, window, groups, dtype))
        return
    band, first = _plain_masks(window, groups, dtype, past)
    own = min(blocks, first.shape[0])
    for row in range(0, batch * blocks, blocks):
        yield from split(row, row + own, first[:own])
        yield from split(row + own, row + blocks, band)


class _Layout(NamedTuple):
    """Layout of the queries and keys of a batch in blocks."""

    batch: int
    time: int
    past: int
    kv_heads: int
    groups: int
    head_dim: int
    window: int

    @property
    def blocks(self) -> int:
        """Blocks of a row of the batch."""
        return -(-self.time // BLOCK)

    def queries(self, x: Tensor) -> Tensor:
        """Copy `[batch, time, kv_heads, groups, head_dim]` into blocks of queries `x_nkqd`."""
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.blocks * BLOCK - self.time))
        x = x.view(self.batch * self.blocks, BLOCK, self.kv_heads, self.groups, self.head_dim)
        return x.transpose(1, 2).reshape(x.shape[0], self.kv_heads, BLOCK * self.groups, self.head_dim)

    def positions(self, x: Tensor) -> Tensor:
        """Return blocks of queries `x_nkqd` as `[batch, time, kv_heads, groups, head_dim]`."""
        x = x.view(-1, self.kv_heads, BLOCK, self.groups, self.head_dim).transpose(1, 2)
        return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.time]

    def row_of_keys(self, x: Tensor) -> Tensor:
        """Lay `[batch, kv_heads, past + time, head_dim]` out as one row, the rows of the batch concatenated.

        Returns `[kv_heads, window + batch * blocks * BLOCK, head_dim]`.
        """
        earlier = min(self.past, self.window)
        if self.batch == 1:
            x = x[0, :, self.past - earlier :]
            return F.pad(x, (0, 0, self.window - earlier, self.blocks * BLOCK - self.time))
        assert not self.past
        x = F.pad(x, (0, 0, 0, self.blocks * BLOCK - self.time)).transpose(0, 1)
        return F.pad(x.flatten(1, 2), (0, 0, self.window, 0))

    def keys(self, row: Tensor, start: int, end: int) -> Tensor:
        """Return a view of the keys of blocks `[start, end)`, `[n, kv_heads, window + BLOCK, head_dim]`."""
        part = row[:, start * BLOCK : end * BLOCK + self.window]
        return part.unfold(1, self.window + BLOCK, BLOCK).permute(1, 0, 3, 2)

    def add_keys(self, total: Tensor, grad: Tensor, start: int) -> None:
        """Add the gradients of blocks of keys to that of the row.

        `total` is one block longer than `row_of_keys`.
        """
        count = grad.shape[0]
        for at in range(0, self.window + BLOCK, BLOCK):
            piece = grad[:, :, at : at + BLOCK].transpose(0, 1)
            begin = start * BLOCK + at
            places = total[:, begin : begin + count * BLOCK].view(self.kv_heads, count, BLOCK, self.head_dim)
            places[:, :, : piece.shape[2]].add_(piece)

    def keys_of_row(self, total: Tensor) -> Tensor:
        """Return the gradient of `[batch, kv_heads, past + time, head_dim]` from that of the row."""
        new = total[:, self.window : self.window + self.batch * self.blocks * BLOCK]
        new = new.view(self.kv_heads, self.batch, -1, self.head_dim)[:, :, : self.time].transpose(0, 1)
        if not self.past:
            return new
        earlier = min(self.past, self.window)
        cached = F.pad(total[None, :, self.window - earlier : self.window], (0, 0, self.past - earlier, 0))
        return torch.cat((cached, new), dim=2)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, document_starts: Tensor | None
    ) -> Tensor:
        batch, time, kv_heads, groups, head_dim = q.shape
        layout = _Layout(batch, time, k.shape[2] - time, kv_heads, groups, head_dim, window)
        ranges = tuple(
            _block_ranges(
                batch,
                layout.blocks,
                window=window,
                groups=groups,
                dtype=q.dtype,
                past=layout.past,
                starts=document_starts,
            )
        )
        queries, keys, values = layout.queries(q), layout.row_of_keys(k), layout.row_of_keys(v)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for start, end, bias in ranges:
            k_and_v = (layout.keys(row, start, end) for row in (keys, values))
            out, lse = fused(queries[start:end], *k_and_v, 0.0, False, attn_mask=bias, scale=1.0)
            outs.append(out)
            lses.append(lse)
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        ctx.save_for_backward(queries, keys, values, out, torch.cat(lses))
        ctx.layout, ctx.ranges = layout, ranges
        return layout.positions(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, lse = ctx.saved_tensors
        layout: _Layout = ctx.layout
        ranges: Sequence[BlockRange] = ctx.ranges
        grad = layout.queries(grad_out)
        upcast = torch.promote_types(keys.dtype, torch.float32)
        # Several blocks contribute to the gradient of a key: they are summed in float32 for any input dtype.
        totals = [
            torch.zeros(keys.shape[0], keys.shape[1] + BLOCK, keys.shape[2], dtype=upcast) for _ in range(2)
        ]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_queries = []
        for start, end, bias in ranges:
            blocks = slice(start, end)
            k_and_v = (layout.keys(row, start, end) for row in (keys, values))
            grad_q, *grad_k_and_v = fused(
                grad[blocks],
                queries[blocks],
                *k_and_v,
                out[blocks],
                lse[blocks],
                0.0,
                False,
                attn_mask=bias,
                scale=1.0,
            )
            grad_queries.append(grad_q)
            for total, grad_part in zip(totals, grad_k_and_v, strict=True):
                layout.add_keys(total, grad_part, start)
        grad_k, grad_v = (layout.keys_of_row(total).to(keys.dtype) for total in totals)
        return layout.positions(torch.cat(grad_queries)), grad_k, grad_v, None, None


def windows_are_faster(q: Tensor, k: Tensor, window: int, document_starts: Tensor | None) -> bool:
    """Return whether `windowed_attention` takes these arguments and is faster (docs/explanation/log.md)."""
    batch, time = q.shape[:2]
    single = batch == 1 and document_starts is None
    if not single and k.shape[2] > time:
        return False
    if q.dtype == torch.bfloat16 and not is_intel():
        # On AMD processors the fused kernel is slower in bfloat16 than a batched matmul.
        return False
    if window > (MAX_WINDOW if document_starts is None else MAX_WINDOW_WITH_DOCUMENTS):
        return False
    return time >= MIN_WINDOWS * window or (single and not torch.is_grad_enabled())


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, document_starts: Tensor | None = None
) -> Tensor:
    """Compute attention of every position to itself and the earlier ones of its window and document.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled by `head_dim ** -0.5`: the last `time` of the
            positions.
        k, v: `[batch, kv_heads, positions, head_dim]`. More positions than `time` (cached ones) are possible
            only for a batch of one without documents.
        window: a position sees itself and the `window - 1` before it.
        document_starts: `[batch, time]` int64, the position at which each query's document begins; at most
            the query's own.

    Returns:
        A tensor of the shape and dtype of q. Softmax and sums are computed in float32 at least.
    """
    result = _WindowedAttention.apply(q, k, v, window, document_starts)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
