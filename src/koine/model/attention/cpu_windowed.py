"""Sliding-window attention on CPU through the fused kernel of `scaled_dot_product_attention`, forward and backward.

Under a mask the kernel works through the whole rectangle of scores that it is given. So it is given small ones: a block of queries with the keys
that any of them may see, all blocks of a text at once. The keys of the blocks overlap and are read where they lie; each block's mask is the same
band, but for blocks that reach before the beginning of the text, or across documents.

Shapes: blocks of queries `[blocks, kv_heads, BLOCK * groups, head_dim]`, position-major; of keys `[blocks, kv_heads, window + BLOCK, head_dim]`: key
`j` of a block is the position `window - j` before its first query, so that query `i` sees the keys `i < j <= i + window`.
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
"""Queries a block: the fastest of 32, 64, 128, 256 from 520 to 8,192 positions (docs/explanation/log.md)."""

WIDEST, WIDEST_WITH_DOCUMENTS = 512, 256
"""Windows up to which this is faster than `blocked_attention`: the gradients of overlapping keys and the masks of documents grow with the window."""

LONG = 4
"""Windows that a text must have to be faster where there are several texts or something is learnt: the first blocks have masks of their own."""

BLOCKS_AT_ONCE = 32
"""Blocks a call: the backward pass holds `(window + BLOCK) / BLOCK` gradients of each key at a time."""


class Part(NamedTuple):
    """Blocks `[start, end)` and what is added to their scores: `[BLOCK * groups, keys]`, or `[blocks, 1, BLOCK * groups, keys]`."""

    start: int
    end: int
    added: Tensor


def _added(seen: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return added.repeat_interleave(groups, dim=-2)


def _band(window: int) -> Tensor:
    query, key = torch.arange(BLOCK)[:, None], torch.arange(window + BLOCK)
    return (key > query) & (key <= query + window)


@functools.lru_cache(maxsize=16)
def _plain_masks(window: int, groups: int, dtype: torch.dtype, before: int) -> tuple[Tensor, Tensor]:
    """The mask of most blocks, and those of the first ones: of texts of which `before` positions were read earlier, they have keys that are not there."""
    # Ordinary tensors even where they are first asked for in inference mode: training saves the same ones.
    with torch.inference_mode(False):
        band = _band(window)
        first = -(-max(0, window - 1 - before) // BLOCK)
        position = torch.arange(first)[:, None, None] * BLOCK - window + torch.arange(window + BLOCK)
        return _added(band, groups, dtype), _added(band & (position >= -before), groups, dtype)[:, None]


_document_masks: Any = WeakTensorKeyDictionary()
"""By where documents begin: all layers of a forward pass have the same, and its backward pass too."""


def _masks_of_documents(starts: Tensor, window: int, groups: int, dtype: torch.dtype) -> Tensor:
    """The mask of every block of `starts` `[batch, time]`, rows of the batch one after another."""
    known: dict[tuple[int, int, torch.dtype], Tensor] = _document_masks.setdefault(starts, {})
    key = (window, groups, dtype)
    if key not in known:
        with torch.inference_mode(False), torch.no_grad():
            padded = F.pad(starts, (0, -starts.shape[1] % BLOCK)).view(starts.shape[0], -1, BLOCK, 1)
            begin = torch.arange(padded.shape[1])[:, None, None] * BLOCK - window
            # Keys before the text have positions below 0, where no document begins.
            seen = _band(window) & (begin + torch.arange(window + BLOCK) >= padded)
            # The queries of the padding see what they like: a row without any key would be NaN.
            seen |= torch.arange(padded.shape[1] * BLOCK).view(-1, BLOCK, 1) >= starts.shape[1]
            known[key] = _added(seen.flatten(0, 1), groups, dtype)[:, None]
    return known[key]


def _parts(
    batch: int,
    blocks: int,
    *,
    window: int,
    groups: int,
    dtype: torch.dtype,
    before: int,
    starts: Tensor | None,
) -> Iterator[Part]:
    """All blocks of a batch, in order."""

    def cut(start: int, end: int, added: Tensor) -> Iterator[Part]:
        for at in range(start, end, BLOCKS_AT_ONCE):
            to = min(end, at + BLOCKS_AT_ONCE)
            yield Part(at, to, added if added.dim() == 2 else added[at - start : to - start])

    if starts is not None:
        yield from cut(0, batch * blocks, _masks_of_documents(starts, window, groups, dtype))
        return
    band, first = _plain_masks(window, groups, dtype, before)
    own = min(blocks, first.shape[0])
    for row in range(0, batch * blocks, blocks):
        yield from cut(row, row + own, first[:own])
        yield from cut(row + own, row + blocks, band)


class _Layout(NamedTuple):
    """How queries and keys of a batch lie in blocks."""

    batch: int
    time: int
    before: int
    kv_heads: int
    groups: int
    head_dim: int
    window: int

    @property
    def blocks(self) -> int:
        """Blocks of a row of the batch."""
        return -(-self.time // BLOCK)

    def queries(self, x: Tensor) -> Tensor:
        """`[batch, time, kv_heads, groups, head_dim]` as blocks of queries."""
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, self.blocks * BLOCK - self.time))
        x = x.view(self.batch * self.blocks, BLOCK, self.kv_heads, self.groups, self.head_dim)
        return x.transpose(1, 2).reshape(x.shape[0], self.kv_heads, BLOCK * self.groups, self.head_dim)

    def positions(self, x: Tensor) -> Tensor:
        """Blocks of queries as `[batch, time, kv_heads, groups, head_dim]`."""
        x = x.view(-1, self.kv_heads, BLOCK, self.groups, self.head_dim).transpose(1, 2)
        return x.reshape(self.batch, -1, *x.shape[2:])[:, : self.time]

    def row_of_keys(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, before + time, head_dim]` as `[kv_heads, window + batch * blocks * BLOCK, head_dim]`: the rows of the batch one after another."""
        earlier = min(self.before, self.window)
        if self.batch == 1:
            x = x[0, :, self.before - earlier :]
            return F.pad(x, (0, 0, self.window - earlier, self.blocks * BLOCK - self.time))
        assert not self.before
        x = F.pad(x, (0, 0, 0, self.blocks * BLOCK - self.time)).transpose(0, 1)
        return F.pad(x.flatten(1, 2), (0, 0, self.window, 0))

    def keys(self, row: Tensor, start: int, end: int) -> Tensor:
        """The keys of blocks `[start, end)`, a view."""
        part = row[:, start * BLOCK : end * BLOCK + self.window]
        return part.unfold(1, self.window + BLOCK, BLOCK).permute(1, 0, 3, 2)

    def add_keys(self, total: Tensor, grad: Tensor, start: int) -> None:
        """Add the gradients of blocks of keys to those of the row: `total` is one block longer than `row_of_keys`."""
        count = grad.shape[0]
        for at in range(0, self.window + BLOCK, BLOCK):
            piece = grad[:, :, at : at + BLOCK].transpose(0, 1)
            begin = start * BLOCK + at
            places = total[:, begin : begin + count * BLOCK].view(self.kv_heads, count, BLOCK, self.head_dim)
            places[:, :, : piece.shape[2]].add_(piece)

    def keys_of_row(self, total: Tensor) -> Tensor:
        """The gradient of `[batch, kv_heads, before + time, head_dim]` from that of the row."""
        new = total[:, self.window : self.window + self.batch * self.blocks * BLOCK]
        new = new.view(self.kv_heads, self.batch, -1, self.head_dim)[:, :, : self.time].transpose(0, 1)
        if not self.before:
            return new
        earlier = min(self.before, self.window)
        held = F.pad(total[None, :, self.window - earlier : self.window], (0, 0, self.before - earlier, 0))
        return torch.cat((held, new), dim=2)


class _WindowedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, document_starts: Tensor | None
    ) -> Tensor:
        batch, time, kv_heads, groups, head_dim = q.shape
        layout = _Layout(batch, time, k.shape[2] - time, kv_heads, groups, head_dim, window)
        parts = tuple(
            _parts(
                batch,
                layout.blocks,
                window=window,
                groups=groups,
                dtype=q.dtype,
                before=layout.before,
                starts=document_starts,
            )
        )
        queries, keys, values = layout.queries(q), layout.row_of_keys(k), layout.row_of_keys(v)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, sums = [], []
        for start, end, added in parts:
            held = (layout.keys(row, start, end) for row in (keys, values))
            part, log_sum = fused(queries[start:end], *held, 0.0, False, attn_mask=added, scale=1.0)
            mixed.append(part)
            sums.append(log_sum)
        out = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        ctx.save_for_backward(queries, keys, values, out, torch.cat(sums))
        ctx.layout, ctx.parts = layout, parts
        return layout.positions(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, out, sums = ctx.saved_tensors
        layout: _Layout = ctx.layout
        parts: Sequence[Part] = ctx.parts
        grad = layout.queries(grad_out)
        wide = torch.promote_types(keys.dtype, torch.float32)
        # A key is met by several blocks: their contributions are summed in float32 whatever the inputs are.
        totals = [
            torch.zeros(keys.shape[0], keys.shape[1] + BLOCK, keys.shape[2], dtype=wide) for _ in range(2)
        ]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_queries = []
        for start, end, added in parts:
            blocks = slice(start, end)
            held = (layout.keys(row, start, end) for row in (keys, values))
            grad_q, *grad_held = fused(
                grad[blocks],
                queries[blocks],
                *held,
                out[blocks],
                sums[blocks],
                0.0,
                False,
                attn_mask=added,
                scale=1.0,
            )
            of_queries.append(grad_q)
            for total, part in zip(totals, grad_held, strict=True):
                layout.add_keys(total, part, start)
        grad_k, grad_v = (layout.keys_of_row(total).to(keys.dtype) for total in totals)
        return layout.positions(torch.cat(of_queries)), grad_k, grad_v, None, None


def windows_are_faster(q: Tensor, k: Tensor, window: int, document_starts: Tensor | None) -> bool:
    """Whether `windowed_attention` takes these arguments and is faster than `blocked_attention` (docs/explanation/log.md)."""
    batch, time = q.shape[:2]
    alone = batch == 1 and document_starts is None
    if not alone and k.shape[2] > time:
        return False
    if q.dtype == torch.bfloat16 and not is_intel():
        # On AMD's the fused kernel's bfloat16 is slower than a batched product's.
        return False
    if window > (WIDEST if document_starts is None else WIDEST_WITH_DOCUMENTS):
        return False
    return time >= LONG * window or (alone and not torch.is_grad_enabled())


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, document_starts: Tensor | None = None
) -> Tensor:
    """Attention of every position to itself and the earlier ones of its window and document.

    Args:
        q: `[batch, time, kv_heads, groups, head_dim]`, scaled by `head_dim ** -0.5`: the last `time` of the positions.
        k, v: `[batch, kv_heads, positions, head_dim]`; more positions than `time` (read earlier) for a batch of one and without documents alone.
        window: a position sees itself and the `window - 1` before it.
        document_starts: `[batch, time]` int64, the position at which each query's document begins; at most the query's own.

    Returns:
        The shape and dtype of q. Softmax and sums are in float32 at least.
    """
    result = _WindowedAttention.apply(q, k, v, window, document_starts)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
