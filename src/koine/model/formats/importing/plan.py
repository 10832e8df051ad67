"""The output of an import: tensors, read and converted piece by piece, and the files beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from koine.errors import UserError
from koine.files import write_atomically, write_json
from koine.model.formats.checksum import write_checksums
from koine.model.formats.model_card import ModelCard, write_model_card
from koine.model.formats.safetensors_stream import CheckpointWriter

MAX_SHARD_BYTES: Final = 5_000_000_000
PIECE_NUMBERS: Final = 2**23
"""Numbers of a tensor that are converted at once; 32 MB in float32."""
FLOAT16_MAX: Final = 65_504.0


@dataclass(frozen=True, kw_only=True)
class ImportedTensor:
    """A tensor to write.

    Attributes:
        name: in `transformers`.
        shape: in `transformers`.
        dtype: to write.
        read: returns the rows from `start` to `stop`, in any dtype; all rows of a vector are one row.
        whole: whether `read` must be asked for all rows at once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    whole: bool = False

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Return the bytes to write."""
        return self.numel * self.dtype.itemsize

    def pieces(self) -> list[tuple[int, int]]:
        """Return the slices of rows, each of about `PIECE_NUMBERS` numbers."""
        rows = self.shape[0] if self.shape else 1
        step = rows if self.whole else max(1, PIECE_NUMBERS * rows // max(1, self.numel))
        return [(start, min(rows, start + step)) for start in range(0, rows, step)]


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """A model to write.

    Attributes:
        source: what it is imported from, for people.
        where: what messages about its content name.
        config: content of `config.json`.
        tensors: in the order of the files.
        texts: files beside the weights, by name.
        carry: copies more files into the folder; None: there are none.
        card: the model card.
        facts: what `--dry-run` tells, besides sizes.
        reads: files and folders that are read.
        close: closes what is open.
    """

    source: str
    where: Path
    config: Mapping[str, Any]
    tensors: tuple[ImportedTensor, ...]
    texts: Mapping[str, str]
    card: ModelCard
    facts: Mapping[str, Any]
    reads: tuple[Path, ...]
    carry: Callable[[Path], None] | None = None
    close: Callable[[], None] = field(default=lambda: None)

    def describe(self) -> dict[str, Any]:
        """Return what would be written."""
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors})
        return {
            "source": self.source,
            **self.facts,
            "tensors": len(self.tensors),
            "parameters": sum(tensor.numel for tensor in self.tensors),
            "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
            "bytes": sum(tensor.nbytes for tensor in self.tensors),
        }

    def write(self, folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write the model into an empty folder. Raises `UserError` for NaN and values beyond float16."""
        write_json(folder / "config.json", dict(self.config))
        if self.carry is not None:
            self.carry(folder)
        for name, text in self.texts.items():
            write_atomically(folder / name, text)
        layout = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}
        writer = CheckpointWriter(folder, layout, max_shard_bytes=max_shard_bytes)
        try:
            for tensor in self.tensors:
                for start, stop in tensor.pieces():
                    writer.write(tensor.name, self._converted(tensor, start, stop), start)
        finally:
            writer.close()
        write_checksums(folder)
        write_model_card(folder, self.card)

    def _converted(self, tensor: ImportedTensor, start: int, stop: int) -> Tensor:
        values = tensor.read(start, stop)
        if values.is_floating_point():
            low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise UserError(
                    f"{tensor.name} holds NaN or infinity",
                    where=self.where,
                    hint="the file is damaged; copy it again, or import another",
                )
            largest = max(-float(low), float(high))
            if tensor.dtype is torch.float16 and largest > FLOAT16_MAX:
                raise UserError(
                    f"{tensor.name} holds {largest:.3g}, which float16 cannot",
                    where=self.where,
                    hint="import with --dtype bfloat16 or float32",
                )
        return values.to(tensor.dtype)
