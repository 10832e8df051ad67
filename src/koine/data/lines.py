"""Read lines of text files of any Unicode encoding as UTF-8, of bounded length."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import IO

from koine.data.decompression import stream_of

LONGEST_LINE = 64 * 2**20
"""Most bytes of a line, and of a record; a longer one is a bad record."""
BOM = codecs.BOM_UTF8
_BLOCK = 2**16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def in_utf8(file: IO[bytes]) -> IO[bytes]:
    """Return the file itself, or its text recoded to UTF-8 if it is UTF-16 or UTF-32.

    The encoding is known by its byte-order mark, or by the zeros of the first characters. Lone surrogates are
    kept, and undecodable bytes end in a byte that is no UTF-8: both make a bad record.
    """
    assert isinstance(file, io.BufferedReader)
    first = file.peek(4)[:4]
    if len(first) < 4:
        first = file.read(4)
        file = stream_of(chain((first,), iter(partial(file.read, _BLOCK), b"")))
    encoding = next((name for mark, name in _MARKS if first.startswith(mark)), None)
    if encoding is None and len(first) == 4:
        # Text in UTF-8 holds no zero byte; the first characters of data in UTF-16 are ASCII.
        zeros = [byte == 0 for byte in first]
        if zeros in ([False, True] * 2, [True, False] * 2):
            encoding = "utf-16-be" if zeros[0] else "utf-16-le"
    return file if encoding is None else stream_of(_recoded(file, encoding))


def _recoded(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        while block := file.read(_BLOCK):
            yield decoder.decode(block).encode("utf-8", "surrogatepass")
        yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        yield b"\xff"


def lines(file: IO[bytes], *, ends: bool = False) -> Iterator[bytes | str]:
    """Yield lines, ended by LF, CR or both, without byte-order marks; for one too long, the reason as str.

    ends: keep the line ends. Time is linear in the file, and memory is that of the longest line allowed.
    """
    pieces: list[bytes] = []
    size = 0
    held = b""
    while block := held + file.read(_BLOCK):
        # A line feed that belongs to a carriage return may be in the next block.
        held = b"\r" if block.endswith(b"\r") and block != held else b""
        for line in block[: len(block) - len(held)].splitlines(keepends=True):
            size += len(line)
            if size <= LONGEST_LINE:
                pieces.append(line)
            if line.endswith((b"\n", b"\r")):
                yield _line(pieces, size, ends)
                pieces, size = [], 0
    if pieces:
        yield _line(pieces, size, ends)


def _line(pieces: list[bytes], size: int, ends: bool) -> bytes | str:
    if size > LONGEST_LINE:
        return f"a line longer than {LONGEST_LINE} bytes"
    line = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    while line.startswith(BOM):
        # Concatenated files have one at the start of each part.
        line = line[len(BOM) :]
    return line if ends else line.rstrip(b"\r\n")
