"""Read rows of JSON files: an object a line, an array of objects, or objects over several lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import IO, Any

from koine.data.decompression import stream_of
from koine.data.lines import BOM, LONGEST_LINE, in_utf8, lines

Row = tuple[str, dict[str, Any] | str]
"""Location of a row (`line 12`), and the row or the reason why it is bad."""

_OUTSIDE = re.compile(rb'["{}\[\],]')
_INSIDE = re.compile(rb'["\\]')
_QUOTE, _BACKSLASH = b'"\\'
_BLOCK = 2**16
_AHEAD = 2**20
"""Bytes of the first lines that are read ahead, to tell objects over several lines from broken ones."""


class UnendingError(Exception):
    """A JSON array or object does not end before the file does."""


def json_row(raw: bytes) -> dict[str, Any] | str:
    """Return the object of a line, or the reason why it is bad."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 ({error.reason} at byte {error.start})"
    except json.JSONDecodeError as error:
        if raw.rstrip().endswith(b",") and error.msg == "Extra data":
            return json_row(raw.rstrip()[:-1])
        return f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "JSON nested too deeply"
    except ValueError:
        # Python parses no integer of more than 4,300 digits, since time grows with their square.
        return "JSON with an integer of thousands of digits"
    return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, not an object"


def read_json_rows(file: IO[bytes], _: object = None) -> Iterator[Row]:
    """Yield the objects of a JSON file of any of the three layouts.

    Raises `UnendingError` if the file ends inside an array or object.
    """
    file = in_utf8(file)
    blocks = iter(partial(file.read, _BLOCK), b"")
    start = b""
    while not start and (block := next(blocks, b"")):
        # Blank lines and byte-order marks do not tell the layout.
        start = block.lstrip(BOM + b" \t\r\n")
    if start.startswith(b"["):
        yield from _values(chain((start,), blocks))
        return
    numbered = enumerate(lines(stream_of(chain((block,), blocks)), ends=True), 1)
    ahead: list[tuple[int, bytes | str]] = []
    size = 0
    for number, raw in numbered:
        ahead.append((number, raw))
        size += len(raw)
        if isinstance(raw, str) or (raw.strip() and (size > _AHEAD or not isinstance(json_row(raw), str))):
            break
    if _is_broken(ahead) and _spans_lines([raw for _, raw in ahead]):
        yield from _values(raw for _, raw in chain(ahead, numbered))
        return
    for number, raw in chain(ahead, numbered):
        if isinstance(raw, str):
            yield f"line {number}", raw
        elif raw.strip():
            yield f"line {number}", json_row(raw)


def _is_broken(ahead: list[tuple[int, bytes | str]]) -> bool:
    """Return whether the first non-blank line is no JSON object."""
    raw = next((raw for _, raw in ahead if isinstance(raw, str) or raw.strip()), "")
    return isinstance(raw, bytes) and isinstance(json_row(raw), str)


def _spans_lines(first: list[bytes | str]) -> bool:
    """Return whether the first line begins an object that ends on a later one, or several objects.

    A line that was cut short is different: no later line completes it.
    """
    filled = [raw for raw in first if isinstance(raw, bytes) and raw.strip()]
    text = b"".join(filled).decode("utf-8", "replace")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # An object of very many lines begins with a bracket alone, then a key.
        return len(filled) > 1 and filled[0].strip() == b"{" and filled[1].lstrip().startswith(b'"')
    line = filled[0].decode("utf-8", "replace")
    return isinstance(value, dict) and (end > len(line) or line[end:].lstrip().startswith("{"))


def _values(blocks: Iterator[bytes | str]) -> Iterator[Row]:
    """Yield the elements of arrays, or of a sequence of objects.

    Each is cut out by its brackets before it is parsed. One that cannot be parsed, or is longer than memory
    allows, is one bad record.
    """
    cut = _Cutter()
    number = 0
    for block in blocks:
        if isinstance(block, str):
            cut.skip(block)
            continue
        for raw in cut.push(block):
            number += 1
            yield f"record {number}", raw if isinstance(raw, str) else json_row(raw)
    rest = cut.rest()
    if cut.open:
        raise UnendingError
    if rest:
        yield f"record {number + 1}", json_row(rest)


class _Cutter:
    """Cut a stream of JSON into the elements of its arrays and the objects outside of them."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._in_array = False
        self._wrong = ""

    @property
    def open(self) -> bool:
        """Whether an array, an object or a string has not ended."""
        return self._in_array or self._in_string or self._depth > 0

    def rest(self) -> bytes:
        """Return the text left outside of any element."""
        return b"".join(self._pieces).strip()

    def skip(self, reason: str) -> None:
        """Mark the current element as bad, because a part of it could not be held."""
        self._wrong = reason

    def push(self, block: bytes) -> Iterator[bytes | str]:
        """Yield the elements that end in this block."""
        start, position = 0, int(self._escaped)
        self._escaped = False
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(block, position):
            byte, position = block[found.start()], found.end()
            if byte == _QUOTE:
                self._in_string = not self._in_string
            elif byte == _BACKSLASH:
                position += 1
                self._escaped = position > len(block)
            else:
                ended = self._bracket(byte)
                if ended is not None:
                    # The comma or bracket after an element is no part of it; the brace of an object is.
                    self._add(block[start : position if ended else position - 1])
                    start = position
                    yield from self._take()
        self._add(block[start:])

    def _bracket(self, byte: int) -> bool | None:
        """Return None: the element continues. False: it ended before this byte. True: it ended with it."""
        if byte == 0x2C:
            return False if self._depth == 0 else None
        if byte in b"[{":
            if byte == 0x5B and not self._in_array and self._depth == 0:
                self._in_array = True
                return False
            self._depth += 1
            return None
        if self._depth == 0:
            self._in_array = False
            return False
        self._depth -= 1
        return True if self._depth == 0 and not self._in_array else None

    def _add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= LONGEST_LINE:
            self._pieces.append(piece)
        else:
            self._wrong = f"a record longer than {LONGEST_LINE} bytes"

    def _take(self) -> Iterator[bytes | str]:
        raw, wrong = b"".join(self._pieces).strip(), self._wrong
        self._pieces, self._size, self._wrong = [], 0, ""
        if wrong:
            yield wrong
        elif raw:
            yield raw
