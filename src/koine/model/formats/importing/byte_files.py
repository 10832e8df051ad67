"""Read one file, or several parts of one file, at byte offsets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.errors import UserError

CACHE_BYTES = 2**20
"""Bytes that a `Cursor` reads ahead."""


class ByteFiles:
    """The bytes of one or more files, read as if they were one.

    Attributes:
        name: what messages call it: the first file.
        size: bytes in all.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.name = paths[0]
        self._descriptors: list[int] = []
        try:
            for path in paths:
                self._descriptors.append(os.open(path, os.O_RDONLY))
        except OSError as error:
            self.close()
            raise UserError(
                f"cannot be read ({error.strerror})", where=path, hint="give a file that you may read"
            ) from None
        sizes = [os.fstat(descriptor).st_size for descriptor in self._descriptors]
        self._ends = list(accumulate(sizes))
        self._starts = [end - size for end, size in zip(self._ends, sizes, strict=True)]
        self.size = self._ends[-1]

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Read `size` bytes at `offset`. Raises `UserError` where the files end before."""
        out = np.empty(size, dtype=np.uint8)
        view, done = memoryview(out.data), 0
        for start, end, descriptor in zip(self._starts, self._ends, self._descriptors, strict=True):
            while done < size and start <= offset + done < end:
                at = offset + done - start
                count = os.preadv(descriptor, [view[done : done + end - start - at]], at)
                if count == 0:
                    break
                done += count
        if done < size:
            raise UserError("ends too early", where=self.name, hint="it is truncated; copy it again")
        return out

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []


class Cursor:
    """A position in `ByteFiles` that moves forward; no read is longer than what is left."""

    def __init__(self, files: ByteFiles) -> None:
        self.files = files
        self.at = 0
        self._cache, self._cached_at = b"", 0

    @property
    def left(self) -> int:
        """Return the bytes after the position."""
        return self.files.size - self.at

    def take(self, size: int, what: str) -> bytes:
        """Read `size` bytes. Raises `UserError` where fewer are left; `what` says of what they are."""
        if size > self.left:
            raise UserError(
                f"{what} has {size:,} bytes, and {self.left:,} are left in the file",
                where=self.files.name,
                hint="it is truncated or damaged; copy it again",
            )
        begin = self.at - self._cached_at
        if not 0 <= begin <= begin + size <= len(self._cache):
            self._cached_at = self.at
            self._cache = self.files.read(self.at, min(self.left, max(size, CACHE_BYTES))).tobytes()
            begin = 0
        self.at += size
        return self._cache[begin : begin + size]

    def integer(self, size: int, what: str) -> int:
        """Read an unsigned integer of `size` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def array(self, dtype: Any, count: int, what: str) -> NDArray[Any]:
        """Read `count` numbers."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(count * kind.itemsize, what), dtype=kind)
