"""Read and write safetensors checkpoints a piece of a tensor at a time, sharded or not.

Memory does not grow with the model: pieces are read and written at their offsets, by several threads. The
`safetensors` library maps whole files and writes them from memory.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.errors import UserError
from koine.files import read_json, write_json
from koine.model.formats.checksum import KEY, NO_CHECKSUM, verify_checksums
from koine.model.formats.opening import check_tokenizer_hash
from koine.model.formats.safetensors_header import header_bytes, read_header
from koine.model.formats.weight_files import weight_files

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHECKSUM_BYTES = 2**22
"""Bytes of a file that are read at once for a checksum."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a checkpoint; `offset` is that of its first byte in `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Return the number of entries."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Return the number of bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def row(self) -> int:
        """Return the entries of one index of the first dimension; 1 for a scalar."""
        return torch.Size(self.shape[1:]).numel() if self.shape else 1

    @property
    def rows(self) -> int:
        """Return the length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


class Checkpoint(Mapping[str, Entry]):
    """The tensors of a model directory by name; opening it reads only headers and checksums.

    Raises:
        UserError: A folder, file or shard is missing, a file is damaged or does not have its checksum, or a
            tensor stands in two shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise UserError("no such folder", where=path, hint="give the folder of a model")
        self.entries: dict[str, Entry] = {}
        check_tokenizer_hash(path)
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
        self._check_index(files)
        verify_checksums(files)
        self._descriptors = {
            file: os.open(file, os.O_RDONLY) for file in {entry.file for entry in self.entries.values()}
        }

    def _check_index(self, files: Sequence[Path]) -> None:
        """Raise `UserError` where the index names a tensor that no shard holds."""
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
        """Read rows `start` to `stop` of a tensor; all by default."""
        entry = self.entries[name]
        last = entry.rows if stop is None else stop
        shape = (last - start, *entry.shape[1:]) if entry.shape else ()
        return self.read_flat(name, start * entry.row, last * entry.row).view(shape)

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        """Read entries `start` to `stop` of the flattened tensor."""
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


def contiguous_runs(rows: Tensor, *, gap: int = 1) -> list[tuple[int, int]]:
    """Return the slices `[start, stop)` of ascending `rows` whose steps are at most `gap`."""
    if not len(rows):
        return []
    cuts = (torch.nonzero(rows[1:] - rows[:-1] > gap)[:, 0] + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(rows)], strict=True))


def _header(file: Path) -> dict[str, Entry]:
    """Read the tensors of a file from its header; raise `UserError` for a dtype that cannot be merged."""
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
    """A checkpoint that is written in pieces, in any order, from any thread.

    Args:
        folder: Where to write.
        layout: Dtype and shape of every tensor.
        max_shard_bytes: Largest file; a larger tensor has a file of its own.
        resume: Keep what an earlier writer of the same layout left.
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
        self.entries: dict[str, Entry] = {}
        self._descriptors: dict[Path, int] = {}
        # Of each tensor, the bytes written in order so far and their CRC-32; -1 once out of order.
        self._written: dict[str, tuple[int, int]] = {}
        shards = _shards(layout, max_shard_bytes)
        for number, names in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._create(folder / name, {name: layout[name] for name in names}, resume=resume)
        if len(shards) > 1:
            total = sum(entry.nbytes for entry in self.entries.values())
            weight_map = {name: entry.file.name for name, entry in self.entries.items()}
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _create(
        self, file: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], *, resume: bool
    ) -> None:
        """Open a shard, write its header, and reserve its size."""
        header = header_bytes(
            {name: (NAMES[dtype], shape) for name, (dtype, shape) in layout.items()},
            metadata={"format": "pt", KEY: NO_CHECKSUM},
        )
        offset = len(header)
        for name, (dtype, shape) in layout.items():
            self.entries[name] = Entry(file, dtype, tuple(shape), offset)
            offset += self.entries[name].nbytes
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        self._descriptors[file] = descriptor
        if not resume:
            os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, header, 0)
        # Reserve the space now, where the system can: a full disk then shows before hours of work.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, offset)
        else:
            os.ftruncate(descriptor, offset)

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write rows of a tensor, from row `start` on."""
        entry = self.entries[name]
        if not tensor.numel():
            return
        data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        # The row of the tensor, not of the entry: rows may stand behind dimensions of length 1.
        row = torch.Size(tensor.shape[1:]).numel()
        begin, done = start * row * entry.dtype.itemsize, 0
        while done < len(data):
            done += os.pwrite(self._descriptors[entry.file], data[done:], entry.offset + begin + done)
        # One thread writes a tensor. Pieces in order are added to the checksum while they are in memory.
        count, value = self._written.get(name, (0, 0))
        if count == begin:
            self._written[name] = begin + len(data), zlib.crc32(data, value)
        else:
            self._written[name] = -1, 0

    def checksum(self, name: str) -> int:
        """Return the CRC-32 of a tensor's bytes.

        They are read back where they were written out of order or by another writer.
        """
        entry = self.entries[name]
        count, value = self._written.get(name, (0, 0))
        if count == entry.nbytes:
            return value
        value = 0
        for at in range(0, entry.nbytes, CHECKSUM_BYTES):
            part = os.pread(
                self._descriptors[entry.file], min(CHECKSUM_BYTES, entry.nbytes - at), entry.offset + at
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


def _shards(layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], max_shard_bytes: int) -> list[list[str]]:
    """Return the tensors of each file, in order, at most `max_shard_bytes` together."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in layout.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
