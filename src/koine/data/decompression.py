"""Read compressed files as byte streams, in linear time and bounded memory, with a limit on the output.

The content decides how a file is decompressed, not its name: a browser may decompress a download and keep its
`.gz`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from koine.errors import UserError, first_line

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_BLOCK = 2**16
_ZSTD_FEED = 2**10
"""Bytes given to zstandard at once: four can become 128 KiB, so one feed gives at most 32 MiB."""
MOST_WINDOW = 2**27
"""Memory that a file may need to be decompressed.

As much as `zstd --long` and `xz -9e` need, and their readers allow by default.
"""
SUSPECTS = ((2**26, 2000), (2**27, 200))
"""A file is rejected once both limits are passed: bytes of output, and ratio to its compressed size.

Text compresses 3 to 20 times.
"""


class DecompressionError(Exception):
    """The compressed data cannot be decompressed further."""

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what)
        self.hint = hint


class _Stream(io.RawIOBase):
    """The pieces of `pieces` as a forward-only file; each is copied once."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._ready = memoryview(piece)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def stream_of(pieces: Iterator[bytes]) -> io.BufferedReader:
    """Return pieces of bytes as one forward-only file."""
    return io.BufferedReader(_Stream(pieces), _BLOCK)


def _pieces_of_zstd(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompress zstd frames one after another.

    The library's own reader accepts a file that ends inside a frame.
    """
    import zstandard

    library = zstandard.ZstdDecompressor(max_window_size=MOST_WINDOW)
    frame, started = library.decompressobj(), False
    while block := raw.read(_BLOCK):
        for begin in range(0, len(block), _ZSTD_FEED):
            packed = block[begin : begin + _ZSTD_FEED]
            while packed:
                started = True
                piece = frame.decompress(packed)
                packed = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, started = library.decompressobj(), False
                if piece:
                    yield piece
    if started:
        raise EOFError("the file ends inside a frame")


def _pieces_of(raw: IO[bytes], new: Callable[[], Any], magic: bytes) -> Iterator[bytes]:
    """Decompress lzma or bz2 streams one after another, a bounded piece at a time.

    Zeros between and after them are padding.
    """
    library, started, packed = new(), False, b""
    while True:
        if not started:
            packed = packed.lstrip(b"\0")
            while not packed or len(packed) < len(magic):
                more = raw.read(_BLOCK)
                packed = (packed + more).lstrip(b"\0")
                if not more:
                    break
            if not packed:
                return
            if not packed.startswith(magic):
                raise EOFError("what follows the first stream is none")
            started = True
        elif library.needs_input:
            packed = raw.read(_BLOCK)
            if not packed:
                raise EOFError("the file ends inside a stream")
        piece = library.decompress(packed, _BLOCK)
        packed = b""
        if piece:
            yield piece
        if library.eof:
            packed = library.unused_data
            library, started = new(), False


def _watched(pieces: Iterator[bytes], raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the pieces, until they are far more than any text could compress to what was read of `raw`."""
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > SUSPECTS[0][0] and any(
            size > most and size > ratio * raw.tell() for most, ratio in SUSPECTS
        ):
            raise DecompressionError(
                f"more than {size // raw.tell()} times its size comes out of the compressed file, "
                "which is no text",
                "unpack it yourself where it is meant",
            )
        yield piece


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _kind(path: Path) -> str:
    """Return the extension of the compression from the first bytes; empty for none."""
    with path.open("rb") as file:
        first = file.read(10)
    if first.startswith(b"\x1f\x8b"):
        return ".gz"
    if first.startswith(b"\xfd7zXZ\0") or (path.suffix.lower() == ".xz" and first.startswith(b"\x5d\0\0")):
        return ".xz"
    skippable = first[1:4] == b"\x2a\x4d\x18" and first[0] & 0xF0 == 0x50
    if first.startswith(b"\x28\xb5\x2f\xfd") or skippable:
        return ".zst"
    if first.startswith(b"BZh") and first[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return ".bz2"
    return ""


def _pieces(kind: str, raw: IO[bytes]) -> Iterator[bytes]:
    if kind == ".gz":
        with gzip.open(raw, "rb") as decompressed:
            yield from _blocks(cast("IO[bytes]", decompressed))
    elif kind == ".zst":
        yield from _pieces_of_zstd(raw)
    elif kind == ".bz2":
        yield from _pieces_of(raw, bz2.BZ2Decompressor, b"BZh")
    else:
        # The old format has no magic number, and one stream a file.
        magic = raw.read(6)
        raw.seek(0)
        yield from _pieces_of(
            raw,
            lambda: lzma.LZMADecompressor(memlimit=MOST_WINDOW),
            b"\xfd7zXZ\0" if magic[0] == 0xFD else b"",
        )


@contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if it is compressed; errors of the libraries become one `UserError`."""
    import zstandard

    try:
        with path.open("rb") as raw:
            kind = _kind(path)
            yield stream_of(_watched(_pieces(kind, raw), raw)) if kind else raw
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        memory = "memory" in str(error).lower()
        raise UserError(
            f"unpacking needs more than {MOST_WINDOW // 2**20} MiB of memory"
            if memory
            else f"the compressed data is damaged or cut off ({first_line(error)})",
            where=path,
            hint="unpack it yourself, or pack it with a smaller window"
            if memory
            else "copy or download it again",
        ) from None
    except DecompressionError as error:
        raise UserError(str(error), where=path, hint=error.hint) from None
