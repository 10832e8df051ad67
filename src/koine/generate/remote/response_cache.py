"""Completions of an endpoint on disk, keyed by the content of the request."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.errors import KoineWarning, UserError
from koine.files import disk_errors, write_json
from koine.generate.engine import Completion
from koine.generate.remote.request_lock import RequestLock

VERSION = 1


def request_key(request: Mapping[str, Any]) -> str:
    """Return the hexadecimal sha256 of a request, independent of the order of its fields.

    Except in a JSON schema: the generated keys follow the order of the schema's keys.
    """
    return hashlib.sha256(_canonical(_schema_in_order(request))).hexdigest()


class ResponseCache:
    """A folder with one file a completion: `answers/ab/abcd....json`.

    A file holds the request, the completion and its hash. Files are written atomically, and several processes
    may share the folder. Nothing is ever removed; deleting files is safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "answers"
        self._locks = folder / "claims"
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Return the path of a completion."""
        return self._folder / key[:2] / f"{key}.json"

    def lock(self, key: str) -> RequestLock:
        """Return the lock on a request, not taken yet."""
        return RequestLock(self._locks, key)

    def get(self, key: str, *, warn: bool = True) -> Completion | None:
        """Return a completion, or None where there is none.

        A damaged one counts as none, with a `KoineWarning`. Raises `UserError` for one that cannot be read,
        or that a later Koine has written: requesting it again would cost again.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(
                f"the answer in the cache cannot be read ({error.strerror})",
                where=path,
                hint="make it readable, or remove it to request it again",
            ) from None
        try:
            return _read_entry(key, content)
        except _OtherVersionError as error:
            raise UserError(
                f"an answer of version {error}, and this Koine reads version {VERSION}",
                where=path,
                hint="use the Koine that wrote it, or give another cache folder",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if warn:
                why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"{path}: a damaged answer in the cache ({why}); it is requested again",
                    KoineWarning,
                    stacklevel=2,
                )
            return None

    def put(self, key: str, request: Mapping[str, Any], completion: Completion) -> None:
        """Write a completion."""
        answer = {
            "text": completion.text,
            "log_probabilities": list(completion.log_probabilities),
            "prompt_tokens": completion.prompt_tokens,
            "finish": completion.finish,
        }
        path = self.path(key)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
        digest = hashlib.sha256(_canonical(answer)).hexdigest()
        write_json(path, {"version": VERSION, "request": request, "answer": answer, "sha256": digest})


class _OtherVersionError(Exception):
    """An entry of a later Koine."""


def _read_entry(key: str, content: bytes) -> Completion:
    """Parse an entry.

    Raises `ValueError`, `KeyError`, `TypeError`, `AttributeError` or `RecursionError` for one that is not of
    `key`.
    """
    try:
        entry = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    version = entry["version"]
    if isinstance(version, int) and not isinstance(version, bool) and version > VERSION:
        raise _OtherVersionError(version)
    if version != VERSION or request_key(entry["request"]) != key:
        raise ValueError("it belongs to another request")
    answer = entry["answer"]
    if hashlib.sha256(_canonical(answer)).hexdigest() != entry["sha256"]:
        raise ValueError("its content does not match its hash")
    text, count, finish = answer["text"], answer["prompt_tokens"], answer["finish"]
    numbers = answer["log_probabilities"]
    if not (
        isinstance(text, str)
        and isinstance(numbers, list)
        and all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        and isinstance(count, int)
        and finish in ("stop", "length")
    ):
        raise ValueError("its fields are of another kind")
    return Completion(
        text=text, tokens=(), log_probabilities=tuple(numbers), prompt_tokens=count, finish=finish
    )


def _schema_in_order(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the request with its schema (`protocol.request_body`) as text, so that its keys are not sorted.

    A request from a damaged file may have any form: it is returned unchanged, and its hash differs.
    """
    found: Any = request
    for name in ("body", "response_format", "json_schema"):
        found = found.get(name) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or "schema" not in found:
        return request
    text = json.dumps(found["schema"], ensure_ascii=False)
    body = request["body"]
    form = {**body["response_format"], "json_schema": {**found, "schema": text}}
    return {**request, "body": {**body, "response_format": form}}


def _canonical(value: Any) -> bytes:
    return json.dumps(
        value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False
    ).encode("utf-8")
