"""Safetensors checkpoints, sharded or not, read and written a piece of a tensor at a time: memory does not
grow with the model.

The `safetensors` library maps files whole and writes them from memory; here pieces are read and written at
their offsets, by several threads.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.combine.merging.methods import BLOCK
from koine.errors import UserError
from koine.files import read_json, write_json
from koine.model.formats.checksum import KEY, UNSEALED, verify
from koine.model.formats.opening import check_other_tokenizer
from koine.model.formats.safetensors_header import header_bytes, read_header
from koine.model.formats.weight_files import weight_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ_BACK = 2**22
"""Bytes of a file that are read at once for a checksum."""

NEAR_ROWS = 8
"""Wanted rows at most so far apart are read together, with those between: a read costs more than a few rows."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint. offset: of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """How many entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """How many bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Entries of a row: of one index of the first dimension; 1 for a scalar."""
        return torch.Size(self.shape[1:]).numel() if self.shape else 1

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a model directory by name; beyond headers, nothing is kept before `read` is called.
    Files that carry a checksum are compared with it, once.

    Raises `UserError` for a missing folder, file or shard, a damaged file, and a tensor that stands in two
    shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError("no such folder", where=path, hint="give the folder of a model")
        self.entries: dict[str, Entry] = {}
        check_other_tokenizer(path)
        files = weight_files(path)
        for file in files:
            for name, entry in _header(file).items():
                if name in self.entries:
                    raise UserError(
                        f"{name} stands in two files",
                        where=path,
                        hint="the folder holds the shards of two models",
                    )
                self.entries[name] = entry
        self._refuse_lost(files)
        verify(files)
        self._descriptors = {
            file: os.open(file, os.O_RDONLY) for file in {entry.file for entry in self.entries.values()}
        }

    def _refuse_lost(self, files: Sequence[Path]) -> None:
        """Raise `UserError` where the index names a tensor that no shard holds: a merge would lack it too."""
        index = self.path / INDEX
        shards = read_json(index)["weight_map"] if index.is_file() and files[0].name != SINGLE else {}
        if {self.path / name for name in shards.values()} != set(files):
            return
        lost = sorted(shards.keys() - self.entries.keys())
        if lost:
            raise UserError(
                f"names {lost[0]}, which no shard holds", where=index, hint="copy the whole folder again"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor; all of it by default."""
        entry = self.entries[name]
        last = entry.rows if stop is None else stop
        shape = (last - start, *entry.shape[1:]) if entry.shape else ()
        return self.read_flat(name, start * entry.row, last * entry.row).view(shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Entries `start` to `stop` of a tensor as one line of numbers."""
        entry = self.entries[name]
        tensor = torch.empty(max(0, stop - start), dtype=entry.dtype)
        size = tensor.numel() * entry.dtype.itemsize
        if size:
            at = entry.offset + start * entry.dtype.itemsize
            view = memoryview(tensor.view(torch.uint8).numpy().data)
            done = 0
            while done < size:
                count = os.preadv(self._descriptors[entry.file], [view[done:]], at + done)
                if count == 0:
                    raise UserError("ends too early", where=entry.file, hint="it is truncated; copy it again")
                done += count
        return tensor

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors = {}

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class StoredTensor:
    """A tensor of a checkpoint that is read where it is sliced. It has what a method of
    `koine.combine.merging.methods` asks of a tensor that it walks through in blocks, so that a method that makes
    several passes holds no tensor whole.

    check: called with every part that was read.
    rows: `[n]`, which of its rows, in this order; None: all of them. dtype: that it is read as; None: as it
    is stored.
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
        """As a tensor's."""
        shape = self._entry.shape
        return torch.Size(shape if self._rows is None else (len(self._rows), *shape[1:]))

    def numel(self) -> int:
        """As a tensor's."""
        return self.shape.numel()

    def new_empty(self, shape: torch.Size) -> Tensor:
        """As a tensor's."""
        return torch.empty(shape, dtype=self.dtype)

    def reshape(self, size: int) -> StoredTensor:
        """Itself: it is sliced as one line of numbers, whatever its shape."""
        if size != -1:
            raise ValueError(f"a stored tensor is read as one line of numbers, not as {size}")
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
        """Rows in any order; those that lie near each other are read together."""
        found = torch.empty((len(rows), *self._entry.shape[1:]), dtype=self._entry.dtype)
        order = rows.argsort()
        ascending = rows[order]
        for start, stop in contiguous_runs(ascending, gap=NEAR_ROWS):
            low, high = int(ascending[start]), int(ascending[stop - 1]) + 1
            read = self._checkpoint.read(self._name, low, high)
            found[order[start:stop]] = read[ascending[start:stop] - low]
        return found


def contiguous_runs(rows: Tensor, *, gap: int = 1) -> list[tuple[int, int]]:
    """The parts `[start, stop)` of ascending `rows` in which each is at most `gap` after the one before."""
    if not len(rows):
        return []
    cuts = (torch.nonzero(rows[1:] - rows[:-1] > gap)[:, 0] + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(rows)], strict=True))


def _header(file: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name, stored in read_header(file).items():
        if stored.dtype not in DTYPES:
            raise UserError(
                f"{name} is of dtype {stored.dtype}",
                where=file,
                hint=f"these are merged: {', '.join(DTYPES)}",
            )
        found[name] = Entry(file, DTYPES[stored.dtype], stored.shape, stored.begin)
    return found


class CheckpointWriter:
    """A checkpoint whose tensors are known by name, dtype and shape before the first of them is written; pieces may come in any order, from any thread.

    Files of at most `max_shard_bytes` each (a larger tensor has one alone). `resume` goes on with files that an earlier writer of the same layout left.
    """

    def __init__(
        self,
        folder: Path,
        layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        *,
        max_shard_bytes: int,
        resume: bool = False,
    ) -> None:
        self.folder = folder
        shards: list[list[str]] = [[]]
        filled = 0
        sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in layout.items()}
        for name, size in sizes.items():
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        self.entries: dict[str, Entry] = {}
        self._descriptors: dict[Path, int] = {}
        self._written: dict[str, tuple[int, int]] = {}
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = folder / (
                SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            )
            text = header_bytes(
                {name: (NAMES[layout[name][0]], layout[name][1]) for name in names},
                metadata={"format": "pt", KEY: UNSEALED},
            )
            offset = len(text)
            for name in names:
                dtype, shape = layout[name]
                self.entries[name] = Entry(file, dtype, tuple(shape), offset)
                weight_map[name] = file.name
                offset += sizes[name]
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            self._descriptors[file] = descriptor
            if not resume:
                os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text, 0)
            # The room is taken now, where the system can: a disk that is too small is known before hours of work, not after.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, offset)
            else:
                os.ftruncate(descriptor, offset)
        if len(shards) > 1:
            total = sum(sizes.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Rows of a tensor, from row `start` on."""
        entry = self.entries[name]
        if not tensor.numel():
            return
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        # Of the tensor, not of the entry: rows may stand behind dimensions of length 1.
        row = torch.Size(tensor.shape[1:]).numel()
        begin, done = start * row * entry.dtype.itemsize, 0
        while done < len(data):
            done += os.pwrite(self._descriptors[entry.file], data[done:], entry.offset + begin + done)
        # A tensor is one thread's; pieces in order are summed while they are at hand.
        count, value = self._written.get(name, (0, 0))
        if count == begin:
            self._written[name] = begin + len(data), zlib.crc32(data, value)
        else:
            self._written[name] = -1, 0

    def checksum(self, name: str) -> int:
        """The CRC-32 of a tensor's bytes.

        Read back from the file where they were written out of order or by another writer.
        """
        entry = self.entries[name]
        count, value = self._written.get(name, (0, 0))
        if count == entry.nbytes:
            return value
        value = 0
        for at in range(0, entry.nbytes, READ_BACK):
            part = os.pread(
                self._descriptors[entry.file], min(READ_BACK, entry.nbytes - at), entry.offset + at
            )
            value = zlib.crc32(part, value)
        return value

    def sync(self) -> None:
        """Wait until everything that was written is on the disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)

    def close(self) -> None:
        """Sync and close the files."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors = {}
