"""Read a GGUF file: its metadata, and where each tensor lies. The tensors are read later, row by row.

The `gguf` library's reader maps the file and trusts its lengths; here each is compared with the file's size
before memory is allocated for it. The format: github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from koine.errors import UserError
from koine.fields import short_repr
from koine.model.formats.importing.byte_files import ByteFiles, Cursor
from koine.model.formats.importing.gguf_types import TensorType, tensor_type

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DAMAGED: Final = "it is truncated or damaged; copy it again"
MOST_DIMENSIONS: Final = 4
LONGEST_NAME: Final = 64
"""Most bytes of a tensor's name in ggml."""

_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""numpy's names of the number types of metadata values, by their ids in the format."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file.

    Attributes:
        shape: as in PyTorch, the contiguous dimension last (the file has it first).
        kind: how its numbers are stored.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Return the bytes of one index of the first dimension; of a vector, all its bytes."""
        inner = prod(self.shape[1:]) if len(self.shape) > 1 else self.shape[0]
        return inner // self.kind.block * self.kind.block_bytes

    @property
    def rows(self) -> int:
        """Return the length of the first dimension; 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def nbytes(self) -> int:
        """Return the bytes in the file."""
        return self.rows * self.row_bytes


class GgufFile:
    """An open GGUF file.

    Attributes:
        metadata: texts, numbers, booleans, and lists of them; arrays of numbers are numpy arrays.
        tensors: by name, in the file's order.

    Raises:
        UserError: the file is truncated or damaged, of an unknown version, or one part of several.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.files = ByteFiles(paths)
        self.where = self.files.name
        try:
            cursor = Cursor(self.files)
            tensor_count, pair_count = self._begin(cursor)
            self.metadata = self._pairs(cursor, pair_count)
            self._check_split()
            self.tensors = self._tensor_table(cursor, tensor_count)
        except BaseException:
            self.close()
            raise

    def read(self, tensor: StoredTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """Read the bytes of rows `start` to `stop`, [rows, bytes of a row]."""
        size = (stop - start) * tensor.row_bytes
        data = self.files.read(tensor.offset + start * tensor.row_bytes, size)
        return data.reshape(stop - start, tensor.row_bytes)

    def close(self) -> None:
        """Close the file."""
        self.files.close()

    # --- header ---

    def _begin(self, cursor: Cursor) -> tuple[int, int]:
        """Return the numbers of tensors and of metadata pairs."""
        magic = cursor.take(4, "the header")
        if magic != MAGIC:
            raise UserError(
                f"is no GGUF file (it begins with {short_repr(magic)})",
                where=self.where,
                hint="give a .gguf file; older ggml files must be converted by llama.cpp",
            )
        version = cursor.integer(4, "the header")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise UserError(
                "is a big-endian GGUF file" if big_endian else f"is a GGUF file of version {version}",
                where=self.where,
                hint="little-endian files of the versions 2 and 3 are read; convert it with llama.cpp",
            )
        tensors, pairs = cursor.integer(8, "the header"), cursor.integer(8, "the header")
        # A tensor's entry has at least 8 + 1 + 4 + 8 + 4 + 8 bytes, a pair 8 + 1 + 4 + 1.
        for count, least, what in ((tensors, 33, "tensors"), (pairs, 14, "metadata values")):
            if count * least > cursor.left:
                raise self._damaged(
                    f"names {count:,} {what}, more than fit into its {self.files.size:,} bytes"
                )
        return tensors, pairs

    def _pairs(self, cursor: Cursor, count: int) -> Mapping[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._text(cursor, "a metadata name")
            if key in found:
                raise self._damaged(f"has the metadata {short_repr(key)} twice")
            kind = cursor.integer(4, key)
            found[key] = self._value(cursor, kind, key)
        return found

    def _value(self, cursor: Cursor, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._text(cursor, key)
        if kind == _ARRAY:
            return self._array(cursor, key)
        if kind not in _NUMBERS:
            raise self._damaged(f"the metadata {short_repr(key)} is of the unknown type {kind}")
        value = cursor.array(_NUMBERS[kind], 1, key)[0]
        if kind == _BOOL:
            return bool(value)
        if isinstance(value, np.float32):
            # The shortest decimal that gives this number: 1e-05, not 9.999999747378752e-06.
            return float(str(value))
        return value.item()

    def _array(self, cursor: Cursor, key: str) -> Any:
        kind = cursor.integer(4, key)
        count = cursor.integer(8, key)
        least = 8 if kind == _STRING else np.dtype(_NUMBERS[kind]).itemsize if kind in _NUMBERS else 1
        if count * least > cursor.left:
            raise self._damaged(
                f"the metadata {short_repr(key)} has {count:,} entries, more than fit into the file"
            )
        if kind == _STRING:
            return [self._text(cursor, key) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._damaged(f"the metadata {short_repr(key)} is a list of the unknown type {kind}")
        values = cursor.array(_NUMBERS[kind], count, key)
        return values.astype(bool) if kind == _BOOL else values

    def _text(self, cursor: Cursor, what: str) -> str:
        size = cursor.integer(8, what)
        try:
            return cursor.take(size, short_repr(what)).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged(f"{short_repr(what)} holds text that is not UTF-8") from None

    def _check_split(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if parts not in (0, 1):
            number = self.metadata.get("split.no", 0)
            raise UserError(
                f"is part {number + 1} of {parts}",
                where=self.where,
                hint="join the parts with llama.cpp's `llama-gguf-split --merge FIRST OUT`",
            )

    # --- tensors ---

    def _tensor_table(self, cursor: Cursor, count: int) -> dict[str, StoredTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._damaged(f"'general.alignment' is {short_repr(alignment)}, no power of two from 8 on")
        entries = [self._entry(cursor) for _ in range(count)]
        begin = -(-cursor.at // alignment) * alignment
        found: dict[str, StoredTensor] = {}
        for name, shape, type_id, offset in entries:
            if name in found:
                raise self._damaged(f"has the tensor {short_repr(name)} twice")
            kind = tensor_type(type_id, name, self.where)
            if shape[-1] % kind.block:
                raise self._damaged(
                    f"{name} has rows of {shape[-1]}, which are no whole blocks of {kind.name} ({kind.block})"
                )
            if offset % alignment:
                raise self._damaged(f"{name} begins at byte {offset:,}, no multiple of {alignment}")
            found[name] = StoredTensor(name, shape, kind, begin + offset)
        self._check_places(found, begin)
        return found

    def _entry(self, cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text(cursor, "a tensor's name")
        dimensions = cursor.integer(4, name)
        if not name or len(name.encode()) > LONGEST_NAME or not re.fullmatch(r"[\w.-]+", name):
            raise self._damaged(f"has a tensor with the name {short_repr(name)}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._damaged(f"{name} has {dimensions} dimensions")
        sizes = [int(size) for size in cursor.array("<u8", dimensions, name)]
        if min(sizes) < 1 or prod(sizes) >= 2**63:
            raise self._damaged(f"{name} has the shape {sizes[::-1]}")
        type_id = cursor.integer(4, name)
        return name, tuple(reversed(sizes)), type_id, cursor.integer(8, name)

    def _check_places(self, tensors: Mapping[str, StoredTensor], begin: int) -> None:
        """Raise `UserError` for tensors that overlap or lie beyond the end of the file."""
        end, before = begin, ""
        for tensor in sorted(tensors.values(), key=lambda one: one.offset):
            if tensor.offset < end:
                raise self._damaged(f"{tensor.name} overlaps {before}")
            end, before = tensor.offset + tensor.nbytes, tensor.name
            if end > self.files.size:
                raise self._damaged(
                    f"{tensor.name} ends at byte {end:,}, and the file has {self.files.size:,}"
                )

    def _damaged(self, what: str) -> UserError:
        return UserError(what, where=self.where, hint=DAMAGED)
