"""Read and write the header of a safetensors file, as strictly as the `safetensors` library does.

A file has eight bytes of length, a JSON header (name -> dtype, shape, data_offsets) and the tensors' bytes
without gaps. The library maps a whole file; this module reads only the header, so that pieces of tensors can
be read at their offsets.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError

LARGEST_HEADER = 100_000_000
"""Most bytes of a header that the library reads."""

DEEPEST = 127
"""Deepest nesting of lists and objects that the library's JSON reader takes."""

BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32,
    "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of an entry, of every dtype of the format."""

_WORD = 2**64


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor as a header describes it. begin, end: offsets of its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class MalformedHeaderError(Exception):
    """The reason why a header is rejected."""


def read_header(file: Path) -> dict[str, HeaderEntry]:
    """Read the entries of all tensors of a safetensors file, in the order of the header.

    Raises `UserError` where the library would: a header that is truncated, too long or malformed; offsets
    that are negative, overlap, leave a gap or do not fit the shape; bytes that are missing at the end or left
    over.
    """
    try:
        size = file.stat().st_size
        header = raw_header(file)
        return _entries(_parsed(header[8:]), len(header), size)
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror})", where=file, hint="there must be a safetensors file here"
        ) from None
    except MalformedHeaderError as error:
        raise UserError(
            f"not a whole safetensors file ({error})",
            where=file,
            hint="it is truncated or damaged; copy or build it again",
        ) from None


def raw_header(file: Path) -> bytes:
    """Read the bytes of a file's length and header, without parsing.

    Raises `MalformedHeaderError` where they are truncated or too long, `OSError` where the system refuses.
    """
    with file.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        first = handle.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8:
            raise MalformedHeaderError("it has no header")
        if length > min(LARGEST_HEADER, size - 8):
            raise MalformedHeaderError("its header is longer than itself")
        return first + handle.read(length)


def header_bytes(layout: Mapping[str, tuple[str, Sequence[int]]], *, metadata: Mapping[str, str]) -> bytes:
    """Build length and header of a file with tensors of these names, dtypes and shapes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, (dtype, shape) in layout.items():
        size = math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parsed(text: bytes) -> list[tuple[str, Any]]:
    """Parse the header into pairs of names and values; objects are lists of pairs (`_Object`).

    With pairs, duplicate fields are found.
    """
    try:
        content = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_Object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_reject_constant,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedHeaderError(f"its header is no JSON: {error}") from None
    if not isinstance(content, _Object):
        raise MalformedHeaderError("its header is no JSON object")
    _check_text(content)
    return content


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, in order."""


def _integer(text: str) -> int | float:
    # The library reads integers of more than 64 bits, and -0, as floating-point numbers.
    if len(text) > 20 or text == "-0":
        return _finite(text)
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _reject_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _check_text(content: _Object) -> None:
    """Reject what Python's JSON reader takes and the library's does not.

    These are half surrogate pairs and deep nesting.
    """
    layer: list[Any] = [content]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in layer:
            if isinstance(value, _Object):
                for name, one in value:
                    _check_surrogates(name)
                    inner.append(one)
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                _check_surrogates(value)
        layer = inner
        if not layer:
            return
    if any(isinstance(value, list) for value in layer):
        raise MalformedHeaderError("its header is nested too deeply")


def _check_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise MalformedHeaderError("its header is no JSON: half a surrogate pair") from None


def _entries(content: list[tuple[str, Any]], data: int, size: int) -> dict[str, HeaderEntry]:
    found: dict[str, HeaderEntry] = {}
    metadata = [value for name, value in content if name == "__metadata__"]
    if len(metadata) > 1:
        raise MalformedHeaderError("__metadata__ appears twice")
    for value in metadata:
        texts = isinstance(value, _Object) and all(isinstance(one, str) for _, one in value)
        if value is not None and not texts:
            raise MalformedHeaderError("__metadata__ holds more than texts")
    for name, value in content:
        if name != "__metadata__":
            found[name] = _entry(name, value, data)
    at = data
    for name, entry in sorted(found.items(), key=lambda pair: (pair[1].begin, pair[1].end)):
        if entry.begin != at or entry.end < entry.begin:
            raise MalformedHeaderError(f"{_shown(name)} does not begin where the tensor before it ends")
        at = entry.end
    if at != size:
        raise MalformedHeaderError(f"its tensors end at byte {at:,} and the file at {size:,}")
    return found


def _entry(name: str, value: Any, data: int) -> HeaderEntry:
    fields = ("dtype", "shape", "data_offsets")
    if isinstance(value, _Object):
        pairs = [(key, one) for key, one in value if key in fields]
        about = dict(pairs)
        if len(about) != 3 or len(pairs) != 3:
            raise MalformedHeaderError(f"{_shown(name)} has no dtype, shape and data_offsets, once each")
    elif isinstance(value, list) and len(value) == 3:
        # The library also takes a list of the three.
        about = dict(zip(fields, value, strict=True))
    else:
        raise MalformedHeaderError(f"{_shown(name)} is no description of a tensor")
    dtype = about["dtype"]
    if isinstance(dtype, _Object) and len(dtype) == 1 and dtype[0][1] is None:
        [(dtype, _)] = dtype
    if not isinstance(dtype, str) or dtype not in BITS:
        raise MalformedHeaderError(f"{_shown(name)} is of an unknown dtype, {_shown(dtype)}")
    shape, offsets = about["shape"], about["data_offsets"]
    if not _sizes(shape):
        raise MalformedHeaderError(f"{_shown(name)} has the shape {_shown(shape)}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise MalformedHeaderError(f"{_shown(name)} has the data_offsets {_shown(offsets)}")
    count = 1
    for length in shape:
        count *= length
        if count >= _WORD:
            raise MalformedHeaderError(f"{_shown(name)} has the shape {_shown(shape)}")
    bits = count * BITS[dtype]
    if bits >= _WORD or bits % 8 or offsets[1] - offsets[0] != bits // 8:
        raise MalformedHeaderError(
            f"{_shown(name)} has {offsets[1] - offsets[0]:,} bytes, and its shape needs {bits // 8:,}"
        )
    return HeaderEntry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and not isinstance(value, _Object)
        and all(type(one) is int and 0 <= one < _WORD for one in value)
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
