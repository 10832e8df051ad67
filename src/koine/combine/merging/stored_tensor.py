"""A tensor that is read from its checkpoint a slice at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from koine.combine.merging.methods import BLOCK
from koine.model.formats.safetensors_stream import Checkpoint, contiguous_runs

NEAR_ROWS = 8
"""Rows at most so far apart are read together, with those between: a read costs more than a few rows."""


class StoredTensor:
    """A tensor of a checkpoint that is read from the disk where it is sliced.

    It has what a merge method needs of a tensor that it walks through in blocks, so that a method of several
    passes holds no complete tensor in memory.

    Args:
        checkpoint, name: The tensor.
        check: Called with every part that was read.
        rows: `[n]`, which of its rows, in this order; None: all.
        dtype: In which slices are returned; None: as stored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        check: Callable[[Tensor], None],
        rows: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._checkpoint, self._name, self._check, self._rows = checkpoint, name, check, rows
        self._entry = checkpoint[name]
        self.dtype = dtype or self._entry.dtype

    @property
    def shape(self) -> torch.Size:
        """Return the shape, of the chosen rows."""
        shape = self._entry.shape
        return torch.Size(shape if self._rows is None else (len(self._rows), *shape[1:]))

    def numel(self) -> int:
        """Return the number of entries."""
        return self.shape.numel()

    def new_empty(self, shape: torch.Size) -> Tensor:
        """Return an empty tensor in memory of this dtype."""
        return torch.empty(shape, dtype=self.dtype)

    def reshape(self, size: int) -> StoredTensor:
        """Return itself: slices are always those of the flattened tensor. `size` must be -1."""
        if size != -1:
            raise ValueError(f"a stored tensor can only be flattened (reshape(-1)), not reshaped to {size}")
        return self

    def __getitem__(self, part: slice) -> Tensor:
        start, stop, step = part.indices(self.numel())
        if step == 1:
            read = self._flat(start, stop)
            self._check(read)
            return read.to(self.dtype)
        span = max(1, BLOCK // step) * step
        return torch.cat([self[at : min(stop, at + span)][::step] for at in range(start, stop, span)])

    def _flat(self, start: int, stop: int) -> Tensor:
        if self._rows is None:
            return self._checkpoint.read_flat(self._name, start, stop)
        row = max(1, self._entry.row)
        first, last = start // row, -(-stop // row)
        found = self._gathered(self._rows[first:last])
        return found.view(-1)[start - first * row : stop - first * row]

    def _gathered(self, rows: Tensor) -> Tensor:
        """Read rows in any order; rows near each other are read together."""
        found = torch.empty((len(rows), *self._entry.shape[1:]), dtype=self._entry.dtype)
        order = rows.argsort()
        ascending = rows[order]
        for start, stop in contiguous_runs(ascending, gap=NEAR_ROWS):
            low, high = int(ascending[start]), int(ascending[stop - 1]) + 1
            read = self._checkpoint.read(self._name, low, high)
            found[order[start:stop]] = read[ascending[start:stop] - low]
        return found
