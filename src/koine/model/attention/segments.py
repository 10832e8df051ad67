"""Attention over trees of segments: completions that share their prompt's keys and values.

A segment attends to the segments on its path to the root, all of their tokens, and causally to itself
(`koine.data.groups`). Windows count positions of the conversation, not columns of the row.

| device | kernel |
|---|---|
| CPU | one call for each run: segments that continue one another in adjacent columns, such as a prompt and its first completion |
| accelerator | SDPA with one dense mask a window |

Shapes: b rows, t columns, k key heads, g query heads of a key head, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koine.model.attention.dispatch import attend, attend_cached, masked_attend
from koine.model.uncompiled import uncompiled


class SegmentPlace(NamedTuple):
    """Columns `[start, start + length)` of a row, and the index of the segment that it continues, or -1."""

    row: int
    start: int
    length: int
    parent: int


class _Run(NamedTuple):
    """Segments `first` to `last`, each the parent of the next, in adjacent columns: queries of one call."""

    first: int
    last: int


class SegmentContext:
    """An `AttentionContext` of rows of segments, for training: it stores nothing."""

    def __init__(
        self,
        segments: Sequence[SegmentPlace],
        positions: Tensor,
        windows: Sequence[int | None],
        softcap: float | None = None,
    ) -> None:
        """Plan the attention of a batch.

        Args:
            segments: in the order of rows and columns; the columns between them are padding.
            positions: `[b, t]`, of each token in its conversation.
            windows: of each layer (`LayerSpec.window`).
            softcap: cap of the scores.
        """
        self._positions, self._windows, self._softcap = positions, windows, softcap
        rows, time = positions.shape
        self._segments = segments
        self._paths = [_path(segments, number) for number in range(len(segments))]
        # Sizes of the pieces of all `rows * time` columns: segments and the padding between them, and runs
        # with the same padding. A run is the path of its last segment from `first` on; None is padding.
        self._key_sizes: list[int] = []
        self._query_sizes: list[int] = []
        self._runs: list[_Run | None] = []
        self._piece_of: list[int] = []
        end = 0
        for number, one in enumerate(segments):
            start = one.row * time + one.start
            self._add_padding(start - end)
            self._piece_of.append(len(self._key_sizes))
            self._key_sizes.append(one.length)
            run = self._runs[-1] if self._runs else None
            if run is not None and start == end and one.parent == number - 1 == run.last:
                self._runs[-1] = run._replace(last=number)
                self._query_sizes[-1] += one.length
            else:
                self._runs.append(_Run(number, number))
                self._query_sizes.append(one.length)
            end = start + one.length
        self._add_padding(rows * time - end)
        lengths = torch.zeros(rows * time, dtype=torch.int64)
        longest = [0] * len(segments)
        for path in self._paths:
            whole = sum(segments[number].length for number in path)
            for number in path:
                longest[number] = max(longest[number], whole)
        for one, whole in zip(segments, longest, strict=True):
            start = one.row * time + one.start
            lengths[start : start + one.length] = whole
        self._lengths = lengths.view(rows, time).to(positions.device)
        self._masks: dict[int | None, Tensor] = {}

    def _add_padding(self, size: int) -> None:
        if size:
            self._key_sizes.append(size)
            self._query_sizes.append(size)
            self._runs.append(None)

    @property
    def positions(self) -> Tensor:
        """Positions for RoPE, `[b, t]`."""
        return self._positions

    @property
    def lengths(self) -> Tensor:
        """Length of the longest conversation that each position belongs to, `[b, t]`."""
        return self._lengths

    def finish(self) -> None:
        """Do nothing: there is no cache."""

    @uncompiled
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend each token to its path (`AttentionContext.attend`)."""
        by_device = self._attend_by_segment if q.device.type == "cpu" else self._attend_with_mask
        return by_device(self._windows[layer], q, k, v)

    def _attend_with_mask(self, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out_bhtd = masked_attend(
            q.flatten(2, 3).transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            window=None,
            document_starts=None,
            softcap=self._softcap,
            mask=self._mask(window),
        )
        return out_bhtd.transpose(1, 2).flatten(2)

    def _attend_by_segment(self, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, time = q.shape[:2]
        # One split each: its gradient is one concatenation, where slices would each fill a tensor of zeros.
        queries = q.flatten(0, 1).split_with_sizes(self._query_sizes)
        keys, values = (one.flatten(0, 1).split_with_sizes(self._key_sizes) for one in (k, v))
        outputs: list[Tensor] = []
        for own, run in zip(queries, self._runs, strict=True):
            if run is None:
                outputs.append(own.new_zeros(len(own), own[0].numel()))
                continue
            path = [self._piece_of[number] for number in self._paths[run.last]]
            seen_k, seen_v = (_concatenated([part[piece] for piece in path])[None] for part in (keys, values))
            if self._paths[run.last][0] == run.first:
                one = attend(
                    own[None], seen_k, seen_v, window=window, document_starts=None, softcap=self._softcap
                )
            else:
                heads_first = (part.transpose(1, 2) for part in (seen_k, seen_v))
                one = attend_cached(own[None], *heads_first, window=window, softcap=self._softcap)
            outputs.append(one[0])
        return torch.cat(outputs).view(rows, time, -1)

    def _mask(self, window: int | None) -> Tensor:
        """Return what each position sees, `[b, 1, t, t]` bool; padding sees itself."""
        if window not in self._masks:
            rows, time = self._positions.shape
            mask = torch.zeros(rows, time, time, dtype=torch.bool)
            positions = self._positions.cpu()
            for one, path in zip(self._segments, self._paths, strict=True):
                query = slice(one.start, one.start + one.length)
                for number in path:
                    other = self._segments[number]
                    mask[one.row, query, other.start : other.start + other.length] = True
            distance = positions[:, :, None] - positions[:, None, :]
            mask &= distance >= 0
            if window is not None:
                mask &= distance < window
            mask |= torch.eye(time, dtype=torch.bool)
            self._masks[window] = mask[:, None].to(self._positions.device)
        return self._masks[window]


def _path(segments: Sequence[SegmentPlace], number: int) -> list[int]:
    """Return the segments from the root to segment `number`, both included."""
    path = [number]
    while segments[path[-1]].parent >= 0:
        path.append(segments[path[-1]].parent)
    return path[::-1]


def _concatenated(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
