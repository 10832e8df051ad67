"""One tensor of a merge: what is read, how it is merged, and the memory that this takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.combine.merging.methods import BLOCK, MergeMethod
from koine.combine.merging.stored_tensor import NEAR_ROWS, StoredTensor
from koine.combine.merging.vocabulary_alignment import VocabularyAlignment
from koine.errors import UserError
from koine.model.formats.safetensors_stream import Checkpoint, Entry

IN_MEMORY_ENTRIES = 2**21
"""A method of several passes gets tensors of up to so many entries in memory.

A larger tensor is read from the disk again in each pass.
"""


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """The merge of the tensors of one name. The plan builds it; `merge_tensor` runs it.

    Attributes:
        name: The tensor's name in the first model and in the result.
        checkpoints: The models; the base last, where there is one.
        entries: The tensor in each of them.
        has_base: Whether the last of them is the base.
        method, options, weights, seed: How to merge.
        read_dtypes: In which the method gets each tensor: as stored, or the wider of that and the result's
            where the configuration names a dtype. Inputs are not rounded before they are merged.
        dtype, shape: Of the result.
        alignment: How the rows of different vocabularies are matched; None where rows match by position.
    """

    name: str
    checkpoints: tuple[Checkpoint, ...]
    entries: tuple[Entry, ...]
    has_base: bool
    method: MergeMethod
    options: Mapping[str, float | bool]
    weights: tuple[float, ...]
    seed: int
    read_dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    alignment: VocabularyAlignment | None = None

    @property
    def numel(self) -> int:
        """Return the number of entries of the result."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Return the bytes of the result."""
        return self.numel * self.dtype.itemsize

    @property
    def working_bytes(self) -> int:
        """Return the most bytes that the merge of this tensor holds at once."""
        count, given = len(self.entries), self.read_dtypes[0]
        out = given.itemsize + (self.dtype.itemsize if self.dtype != given else 0)
        # Methods work in float32 (float64 stays): the differences of all models, masks of them, their sum.
        upcast = (2 * count + 2) * max(4, given.itemsize)
        read = sum(
            entry.dtype.itemsize + (dtype.itemsize if dtype != entry.dtype else 0)
            for entry, dtype in zip(self.entries, self.read_dtypes, strict=True)
        )
        if self.alignment is not None:
            # Rows are gathered from what was read, which may hold some that are not wanted.
            read *= 2 + NEAR_ROWS
        if self.method.elementwise:
            return min(self.numel, max(BLOCK, self.entries[0].row)) * (read + out + upcast)
        block = min(self.numel, BLOCK)
        in_memory = self.numel if self.numel <= IN_MEMORY_ENTRIES else block
        return self.numel * out + in_memory * read + block * upcast

    def stored(self, index: int, rows: Tensor | None = None) -> StoredTensor:
        """Return the tensor of one model, read where it is sliced and checked for NaN and infinity.

        Args:
            index: The model, in the order of `checkpoints`.
            rows: `[n]`, the rows that are read, in this order; None: all.
        """
        checkpoint = self.checkpoints[index]

        def check(part: Tensor) -> None:
            check_finite(part, self.name, checkpoint.path)

        return StoredTensor(checkpoint, self.name, check, rows, self.read_dtypes[index])


def check_finite(tensor: Tensor, name: str, path: Path) -> None:
    """Raise `UserError` where a model's tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise UserError(
            f"{name} holds NaN or infinity", where=path, hint="this checkpoint is broken; use an earlier one"
        )


def is_finite(tensor: Tensor) -> bool:
    """Return whether every entry is finite."""
    # A finite sum proves it, and is fast. Only where it is not, the entries are looked at: large ones may
    # overflow the sum. bfloat16 is summed as it is: it has the range of float32, is added up in it, and
    # that takes half the time of a sum with a copy in float32.
    dtype = None if tensor.dtype == torch.bfloat16 else torch.float32
    return bool(tensor.sum(dtype=dtype).isfinite()) or bool(torch.isfinite(tensor).all())
