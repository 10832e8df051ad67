"""Decode token ids one at a time, without broken characters."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def byte_level_table() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves; the characters from U+0100 stand for the other 68
    bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


class StreamDecoder:
    """Decode ids one at a time: `push` returns the text that is final, which may be empty."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the text completed by this token; bytes that cannot become a character turn into U+FFFD."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """Return the rest at the end: empty, or one U+FFFD for an unfinished character."""
        return self._decoder.decode(b"", final=True)


class WindowStreamDecoder:
    """A `StreamDecoder` for vocabularies that are not byte-level; decodes a window of ids at a time."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._given = 0  # ids whose text has been given out; they stay as context, since spaces depend on it
        self._context = 0

    def push(self, token: int) -> str:
        """Return the text that this token completes; later tokens do not change it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._given])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        self._context = self._given
        self._given = len(self._ids)
        return now[len(before) :]

    def flush(self) -> str:
        """Return the rest at the end."""
        before = self._decode(self._ids[self._context : self._given])
        now = self._decode(self._ids[self._context :])
        self._given = len(self._ids)
        return now[len(before) :]
