"""Read the body of a response, held to a size both as it comes and unpacked."""

from __future__ import annotations

import zlib

import httpx2

ENCODINGS = "gzip, deflate"
"""Encodings that are asked for; the library would otherwise offer what happens to be installed."""

_PIECE = 1 << 16


class BodyError(Exception):
    """A body that is too large, or packed in a way that cannot be read."""


async def read_body(response: httpx2.Response, limit: int) -> bytes:
    """The whole body, unpacked.

    Raises `BodyError` where it is longer than `limit` bytes or cannot be unpacked.
    """
    raw = bytearray()
    async for piece in response.aiter_raw():
        raw += piece
        if len(raw) > limit:
            raise BodyError(f"it is longer than {limit:,} bytes")
    return _unpacked(bytes(raw), response.headers.get("Content-Encoding", ""), limit)


async def read_beginning(response: httpx2.Response, limit: int) -> bytes:
    """The body's first bytes, for a message; one that cannot be unpacked counts as empty."""
    raw = bytearray()
    async for piece in response.aiter_raw():
        raw += piece
        if len(raw) >= limit:
            break
    try:
        return _unpacked(bytes(raw), response.headers.get("Content-Encoding", ""), limit, whole=False)
    except BodyError:
        return b""


def _unpacked(data: bytes, encodings: str, limit: int, *, whole: bool = True) -> bytes:
    names = [name.strip().lower() for name in encodings.split(",") if name.strip()]
    if len(names) > 3:
        raise BodyError(f"it is packed {len(names)} times")
    for name in reversed(names):
        if name in ("identity", "utf-8", "none"):
            continue
        if data.lstrip()[:1] in (b"{", b"["):
            # Announced as packed, and sent plain.
            return data
        if name in ("gzip", "x-gzip"):
            data = _inflated(data, 16 + zlib.MAX_WBITS, limit, whole)
        elif name == "deflate":
            # "deflate" is with or without a header (RFC 9110, 8.4.1.2); the first byte of one says so.
            plain = len(data) > 1 and (data[0] & 15 != 8 or (data[0] << 8 | data[1]) % 31 != 0)
            data = _inflated(data, -zlib.MAX_WBITS if plain else zlib.MAX_WBITS, limit, whole)
        else:
            raise BodyError(f"it is packed as '{name}', which was not asked for")
    return data


def _inflated(data: bytes, window: int, limit: int, whole: bool) -> bytes:
    """Unpack, in steps, no more than `limit` bytes."""
    out = bytearray()
    try:
        while data:
            unpacker = zlib.decompressobj(window)
            while data and not unpacker.eof:
                out += unpacker.decompress(data, _PIECE)
                data = unpacker.unconsumed_tail or unpacker.unused_data
                if len(out) > limit:
                    if whole:
                        raise BodyError(f"it is longer than {limit:,} bytes")
                    return bytes(out[:limit])
            if not unpacker.eof:
                if whole:
                    raise BodyError("it breaks off")
                break
            if not data.startswith(b"\x1f\x8b"):
                break  # what follows the end is no further part
    except zlib.error as error:
        raise BodyError(f"it cannot be unpacked ({error})") from None
    return bytes(out)
