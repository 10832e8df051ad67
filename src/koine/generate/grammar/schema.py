"""Serialize a JSON schema in the order of its keys, which is the order of the generated keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from koine.errors import UserError


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return the schema as one line of JSON, in its own key order.

    Raises `UserError` for a schema that is no JSON object: sets, keys that are not strings, lone surrogates,
    NaN.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the schema is no JSON ({error})", hint="give a JSON schema as an object") from None
    if not text.startswith("{"):
        raise UserError("the schema is no JSON object", hint='give one such as {"type": "object"}')
    try:
        _check_keys(schema)
    except RecursionError:
        raise UserError("the schema is nested too deeply", hint="flatten it") from None
    return text


def _check_keys(value: Any) -> None:
    """Raise `UserError` for keys that are not strings: `json` would write the key 1 as "1"."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise UserError(
                    f"the schema is no JSON (the key {key!r} is no string)",
                    hint="give a JSON schema as an object",
                )
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)
