"""Parse the body of a response to one JSON object; the chunks of a streamed response are joined."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from koine.generate.remote.response_errors import MalformedError
from koine.generate.remote.response_fields import first_item, read_reason, read_text

_CHARSETS = re.compile(r"(iso|windows|cp|gb|big|shift|euc|koi|latin|utf|mac|us)[a-z0-9_-]*|ascii")


def read_document(content: bytes, charset: str | None) -> dict[str, Any]:
    """Return the JSON object of a response. The chunks of a streamed response are joined to one."""
    text = decode(content, charset).strip()
    if not text:
        raise MalformedError("it is empty")
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        chunks = _stream_chunks(text)
        if chunks is None:
            # Without positions and excerpts, so that equal faults have equal kinds.
            name = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else str(error)
            raise MalformedError(f"it is no JSON ({name})", message=text) from None
        return _join_chunks(chunks)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise MalformedError("it is no JSON object", message=text)
    return value


def decode(content: bytes, charset: str | None) -> str:
    """Decode a body: UTF-8 (or 16, 32), else the response's charset, else with replacements."""
    encodings: list[str] = [json.detect_encoding(content) if content[:4].count(0) else "utf-8"]
    if charset is not None and _CHARSETS.fullmatch(charset.strip().lower()):
        encodings.append(charset.strip())
    for encoding in encodings:
        try:
            return content.decode(encoding).lstrip("\ufeff")
        except (UnicodeError, LookupError):
            continue
    return content.decode("utf-8", "replace").lstrip("\ufeff")


def parse_json(text: str) -> Any:
    """Parse JSON that may have line breaks in strings, and numbers of any length.

    Raises `ValueError`, `RecursionError`.
    """

    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) < 1000 else math.inf

    return json.loads(text, strict=False, parse_int=integer)


def _stream_chunks(text: str) -> list[dict[str, Any]] | None:
    """Return the objects of a streamed response, or None where it is not one.

    A stream is server-sent events, or one object a line.
    """
    objects = []
    ended = False
    for line in text.splitlines():
        line = line.strip().removeprefix("\ufeff")
        name, colon, rest = line.partition(":")
        if not line or (colon and name in ("", "event", "id", "retry")):
            continue
        data = rest.strip() if name == "data" and colon else line
        if data == "[DONE]":
            ended = True
            continue
        try:
            value = parse_json(data)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        objects.append(value)
    if not objects:
        return None
    return [*objects, {"ended": True}] if ended else objects


def _join_chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the chunks of a streamed response. Raises `MalformedError` where it is incomplete."""
    if len([chunk for chunk in chunks if "ended" not in chunk]) == 1:
        first = chunks[0]
        if not isinstance(first_item(first.get("choices")), dict) or "delta" not in first["choices"][0]:
            return first  # a complete response after comments
    text, reasoned, reason, error, usage = "", False, "", None, None
    entries: list[Any] = []
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        error = chunk.get("error") or error
        choice = first_item(chunk.get("choices"))
        if not isinstance(choice, dict):
            choice = chunk if "message" in chunk else {}
        piece, reasoning = read_text(choice)
        text, reasoned = text + piece, reasoned or reasoning
        reason = read_reason(choice, chunk) or reason
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
            entries += logprobs["content"]
    if not reason and not error and "ended" not in chunks[-1]:
        raise MalformedError("it is a stream that breaks off")
    message: dict[str, Any] = {"content": text, "reasoning_content": "x" if reasoned else None}
    choice = {
        "message": message,
        "finish_reason": reason,
        "logprobs": {"content": entries} if entries else None,
    }
    return {"choices": [choice], "usage": usage, "error": error}
