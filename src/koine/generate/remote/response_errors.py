"""Errors that a server reports in a response with a success status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from koine.generate.remote.retry import is_transient

# Fields of an error that hold its message, or an object that does.
_MESSAGES = (
    "error", "message", "detail", "errors", "error_msg", "error_message", "msg", "status_msg", "base_resp",
)  # fmt: skip


class MalformedError(Exception):
    """A response that cannot be used: no JSON, no choices, fields of the wrong type.

    kind: equal for responses that are malformed in the same way.
    message: the server's error message, not redacted yet.
    transient: whether the server reports a failure that may pass; None where it does not say.
    """

    def __init__(self, kind: str, *, message: str = "", transient: bool | None = None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.message = message
        self.transient = transient


def read_error(document: Mapping[str, Any]) -> MalformedError | None:
    """Return the error in a response with a success status, or None."""
    if not is_error(document):
        return None
    error = document.get("error")
    inner = error if isinstance(error, dict) else document
    code = next(
        (inner[name] for name in ("code", "status", "status_code") if inner.get(name) is not None), None
    )
    transient = None
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    if isinstance(code, int) and 400 <= code < 600:
        transient = is_transient(code)
    return MalformedError("it is an error", message=server_message(document), transient=transient)


def malformed(kind: str, document: Mapping[str, Any]) -> MalformedError:
    """Return a `MalformedError` with the server's message."""
    return MalformedError(kind, message=server_message(document))


def server_message(value: Any) -> str:
    """Return the message in an error, or all of it where no known field holds one."""
    for _ in range(6):
        inner = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(inner, dict):
            break
        name = next((name for name in _MESSAGES if inner.get(name)), None)
        if name is None:
            break
        value = inner[name]
    if isinstance(value, str):
        return value
    return "" if value is None else dump_json(value)


def dump_json(value: Any) -> str:
    """Return a value as JSON, for a message."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "deeply nested JSON"


def is_error(document: Mapping[str, Any]) -> bool:
    """Return whether a response reports an error."""
    return (
        bool(document.get("error")) or document.get("success") is False or document.get("object") == "error"
    )
