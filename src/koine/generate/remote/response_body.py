"""Read the body of a response, with a limit of its compressed and decompressed size."""

from __future__ import annotations

import zlib

import httpx2

ENCODINGS = "gzip, deflate"
"""Accepted encodings. The library's default depends on what is installed."""

_PIECE = 1 << 16


class BodyError(Exception):
    """A body that is too large or cannot be decompressed."""


async def read_body(response: httpx2.Response, limit: int) -> bytes:
    """Return the decompressed body.

    Raises `BodyError` where it is longer than `limit` bytes or cannot be decompressed.
    """
    raw = bytearray()
    async for piece in response.aiter_raw():
        raw += piece
        if len(raw) > limit:
            raise BodyError(f"it is longer than {limit:,} bytes")
    return _decompress(bytes(raw), response.headers.get("Content-Encoding", ""), limit)


async def read_beginning(response: httpx2.Response, limit: int) -> bytes:
    """Return the first bytes of the body, for a message; empty where they cannot be decompressed."""
    raw = bytearray()
    async for piece in response.aiter_raw():
        raw += piece
        if len(raw) >= limit:
            break
    try:
        return _decompress(bytes(raw), response.headers.get("Content-Encoding", ""), limit, whole=False)
    except BodyError:
        return b""


def _decompress(data: bytes, encodings: str, limit: int, *, whole: bool = True) -> bytes:
    names = [name.strip().lower() for name in encodings.split(",") if name.strip()]
    if len(names) > 3:
        raise BodyError(f"it is packed {len(names)} times")
    for name in reversed(names):
        if name in ("identity", "utf-8", "none"):
            continue
        if data.lstrip()[:1] in (b"{", b"["):
            # Declared as compressed, and sent plain.
            return data
        if name in ("gzip", "x-gzip"):
            data = _inflate(data, 16 + zlib.MAX_WBITS, limit, whole)
        elif name == "deflate":
            # "deflate" is with or without a header (RFC 9110, 8.4.1.2); the first byte of one says so.
            plain = len(data) > 1 and (data[0] & 15 != 8 or (data[0] << 8 | data[1]) % 31 != 0)
            data = _inflate(data, -zlib.MAX_WBITS if plain else zlib.MAX_WBITS, limit, whole)
        else:
            raise BodyError(f"it is packed as '{name}', which was not asked for")
    return data


def _inflate(data: bytes, window: int, limit: int, whole: bool) -> bytes:
    """Decompress at most `limit` bytes, step by step."""
    out = bytearray()
    try:
        while data:
            inflater = zlib.decompressobj(window)
            while data and not inflater.eof:
                out += inflater.decompress(data, _PIECE)
                data = inflater.unconsumed_tail or inflater.unused_data
                if len(out) > limit:
                    if whole:
                        raise BodyError(f"it is longer than {limit:,} bytes")
                    return bytes(out[:limit])
            if not inflater.eof:
                if whole:
                    raise BodyError("it breaks off")
                break
            if not data.startswith(b"\x1f\x8b"):
                break  # what follows is not another gzip member
    except zlib.error as error:
        raise BodyError(f"it cannot be unpacked ({error})") from None
    return bytes(out)
