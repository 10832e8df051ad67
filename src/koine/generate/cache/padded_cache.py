"""KV cache of a left-padded batch, as `transformers` takes it in place of its own `DynamicCache`.

All rows end at the same column, so a row's newest key stands under the newest keys of the others. Rows join and
leave between two forward passes. Keys and values are written into buffers with spare columns at the end; the
cache of `transformers` copies everything for every token instead.

Shape suffixes: r rows, h heads, c columns, d head size (`keys_rhcd`). A column is a position of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

SPARE_COLUMNS = 32
"""Least spare columns of a buffer that is allocated; a quarter of its columns where that is more."""


@dataclass(frozen=True)
class LayerShape:
    """The keys and values that one layer keeps of a token.

    heads, key_size, value_size: shape of a token's keys and values; itemsize: bytes of one number.
    window: tokens that a query sees, itself included; None for full attention.
    """

    heads: int
    key_size: int
    value_size: int
    itemsize: int
    window: int | None

    def kept(self, columns: int) -> int:
        """Return how many of so many columns the layer keeps."""
        return columns if self.window is None else min(columns, self.window - 1)

    def allocated_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a new buffer that holds so many rows and columns."""
        kept = self.kept(columns)
        size = self.heads * (self.key_size + self.value_size) * self.itemsize
        return rows * (kept + spare(kept)) * size


def spare(columns: int) -> int:
    """Return the spare columns of a new buffer with so many columns."""
    return max(SPARE_COLUMNS, columns // 4)


def layer_shapes(past: Any) -> list[LayerShape] | None:
    """Return the shapes of a cache that a class made itself, or None where rows cannot be padded in it.

    Recurrent states, sparse attention with an index and caches of a class's own cannot.
    """
    if type(past) is not DynamicCache or not past.layers:
        return None
    shapes = []
    for layer in past.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not isinstance(layer.keys, Tensor):
            return None
        keys, values = layer.keys, layer.values
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            return None
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        if window is not None and window < 2:
            return None
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.element_size(), window))
    return shapes


class PaddedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """Keys and values of one layer.

    `rows` rows and the columns from `start` to `end` of the buffers are in use. `dropped` columns before them
    have left the window.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.is_sliding = window is not None
        if window is not None:
            # Classes read the window from here.
            self.sliding_window = window
        self.rows = self.start = self.end = self.dropped = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for the first rows."""
        self._allocate(key_states, value_states, key_states.shape[-2])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[r, h, c, d]` keys and values of new tokens; return all that the new queries may see."""
        new = key_states.shape[-2]
        if self.window is not None and new > SPARE_COLUMNS:
            return self._update_window(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.end + new > self.keys.shape[2]:
            self._move(self.end - self.start + new)
        self.keys[: self.rows, :, self.end : self.end + new] = key_states
        self.values[: self.rows, :, self.end : self.end + new] = value_states
        self.end += new
        seen = self.used()
        if self.window is not None:
            left = max(0, self.end - self.start - (self.window - 1))
            self.start += left
            self.dropped += left
        return seen

    def used(self) -> tuple[Tensor, Tensor]:
        """Return views of the keys and values in use."""
        rows, columns = slice(0, self.rows), slice(self.start, self.end)
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def get_seq_length(self) -> int:
        """Return the columns so far, those that left the window included."""
        return self.dropped + self.end - self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next queries see, and the column of the first."""
        length = int(getattr(query_length, "shape", (query_length,))[0])
        return self.end - self.start + length, self.dropped

    def get_max_length(self) -> int:
        """Return -1: the buffers grow."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1; the name of earlier versions of `transformers` for `get_max_length`."""
        return -1

    def bytes(self) -> int:
        """Return the bytes of the buffers."""
        return sum(one.numel() * one.element_size() for one in (self.keys, self.values) if one is not None)

    # -- between two forward passes ---

    def append_rows(self, other: PaddedLayer) -> None:
        """Append the rows of another layer, which gives up its buffers. The shorter of the two are padded."""
        mine, theirs = self.used(), other.used()
        rows, columns = self.rows + other.rows, max(self.end - self.start, other.end - other.start)
        self.dropped = max(self.get_seq_length(), other.get_seq_length()) - columns
        for name, upper, lower in zip(("keys", "values"), mine, theirs, strict=True):
            buffer = upper.new_zeros(rows, upper.shape[1], columns + spare(columns), upper.shape[3])
            buffer[: len(upper), :, columns - upper.shape[2] : columns] = upper
            buffer[len(upper) :, :, columns - lower.shape[2] : columns] = lower
            setattr(self, name, buffer)
        other.keys, other.values = mine[0].new_empty(0), mine[1].new_empty(0)
        self.rows, self.start, self.end = rows, 0, columns

    def remove_row(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = self.rows - 1
        if row != last:
            for used in self.used():
                used[row] = used[last]
        self.rows = last
        if 2 * last <= self.keys.shape[0]:
            self._move(self.end - self.start)

    def trim(self, columns: int) -> None:
        """Remove the first columns, which only padding holds."""
        gone = min(columns, self.dropped)
        self.dropped -= gone
        self.start += columns - gone

    def row_copy(self, row: int, length: int, tokens: int) -> PaddedLayer:
        """Return a copy of the first `tokens` tokens of a row that holds `length`.

        Possible where none of them has left the window.
        """
        copy = PaddedLayer(self.window)
        begin = max(self.start, self.end - length)
        stop = self.end - (length - tokens)
        keys, values = self.keys[row : row + 1, :, begin:stop], self.values[row : row + 1, :, begin:stop]
        copy._allocate(keys, values, stop - begin)
        for name, part in (("keys", keys), ("values", values)):
            getattr(copy, name)[:, :, : stop - begin] = part
        copy.end, copy.dropped = stop - begin, tokens - (stop - begin)
        return copy

    def _update_window(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a chunk of prompts, of which the buffers keep the last window only."""
        assert self.window is not None
        if self.is_initialized:
            used = self.used()
            keys, values = torch.cat([used[0], keys], dim=2), torch.cat([used[1], values], dim=2)
        kept = min(keys.shape[2], self.window - 1)
        self._allocate(keys, values, kept)
        self.keys[:, :, :kept], self.values[:, :, :kept] = keys[:, :, -kept:], values[:, :, -kept:]
        self.end, self.dropped = kept, self.dropped + keys.shape[2] - kept
        return keys, values

    def _allocate(self, keys: Tensor, values: Tensor, columns: int) -> None:
        """Allocate buffers for the rows of `keys` and so many columns."""
        room = columns + spare(columns)
        # Padding is never seen, and must be finite: weight 0 times NaN is NaN.
        self.keys = keys.new_zeros(*keys.shape[:2], room, keys.shape[3])
        self.values = values.new_zeros(*values.shape[:2], room, values.shape[3])
        self.rows, self.start, self.end, self.is_initialized = keys.shape[0], 0, 0, True

    def _move(self, columns: int) -> None:
        """Move what is in use into buffers for so many columns."""
        held = self.end - self.start
        for name, used in zip(("keys", "values"), self.used(), strict=True):
            room = columns + spare(columns)
            buffer = used.new_zeros(self.rows, used.shape[1], room, used.shape[3])
            buffer[:, :, :held] = used
            setattr(self, name, buffer)
        self.start, self.end = 0, held


class PaddedCache:
    """KV cache of several texts of different lengths.

    Attributes:
        shapes: one a layer.
        past: the cache that the class's forward takes.
        lengths: tokens of each row in the cache.
    """

    def __init__(self, shapes: Sequence[LayerShape], layers: Sequence[PaddedLayer] | None = None) -> None:
        self.shapes = list(shapes)
        self.past = DynamicCache()
        self.past.layer_class_to_replicate = None
        self.past.layers = list(layers or [PaddedLayer(shape.window) for shape in shapes])
        self.lengths: list[int] = []

    @property
    def columns(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def bytes(self) -> int:
        """Return the bytes of the buffers."""
        return sum(layer.bytes() for layer in self.past.layers)

    def allocated_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a new cache of so many rows and columns."""
        return sum(shape.allocated_bytes(rows, columns) for shape in self.shapes)

    def grown_bytes(self, new: int = 1) -> int:
        """Return the bytes after `new` more columns."""
        total = 0
        for shape, layer in zip(self.shapes, self.past.layers, strict=True):
            if not layer.is_initialized or layer.end + new <= layer.keys.shape[2]:
                total += layer.bytes()
            else:
                total += shape.allocated_bytes(layer.rows, self.columns + new)
        return total

    def positions(self, counts: Sequence[int], device: torch.device) -> tuple[Tensor | None, Tensor]:
        """Return the attention mask `[r, c]` and position ids `[r, new]` for the next tokens of each row.

        The mask is None where no row has padding.

        Args:
            counts: new tokens of each row; they differ only where the cache is empty.
            device: of the result.
        """
        after = [
            length + count for length, count in zip(self.lengths or [0] * len(counts), counts, strict=True)
        ]
        new, columns = max(counts), max(after)
        padding_r1 = columns - torch.tensor(after, device=device)[:, None]
        columns_c = torch.arange(columns, device=device)
        positions = (columns_c[columns - new :] - padding_r1).clamp(min=0)
        mask = None if min(after) == columns else (columns_c >= padding_r1).long()
        return mask, positions

    def extend(self, counts: Sequence[int]) -> None:
        """Take note of new tokens, after the forward pass that wrote their keys and values."""
        self.lengths = [
            length + count for length, count in zip(self.lengths or [0] * len(counts), counts, strict=True)
        ]

    def join(self, other: PaddedCache) -> None:
        """Append the rows of another cache, which is empty afterwards."""
        if not self.lengths:
            self.past.layers = other.past.layers
        else:
            for mine, theirs in zip(self.past.layers, other.past.layers, strict=True):
                mine.append_rows(theirs)
        self.lengths += other.lengths

    def remove(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        before = self.columns
        last = self.lengths.pop()
        if row < len(self.lengths):
            self.lengths[row] = last
        for layer in self.past.layers:
            layer.remove_row(row)
            if self.lengths:
                layer.trim(before - self.columns)

    def row_copy(self, row: int, tokens: int) -> PaddedCache:
        """Return a copy of the first tokens of a row, a cache of its own."""
        length = self.lengths[row]
        copy = PaddedCache(self.shapes, [layer.row_copy(row, length, tokens) for layer in self.past.layers])
        copy.lengths = [tokens]
        return copy

    def can_cut(self, row: int) -> bool:
        """Return whether a shorter beginning of a row can be copied: none of it has left a window."""
        length = self.lengths[row]
        return all(shape.kept(length) == length for shape in self.shapes)
