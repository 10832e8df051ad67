"""Answers of an endpoint on disk, addressed by what was asked."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.errors import KoineWarning
from koine.files import disk_errors, write_json
from koine.serve.engine import Completion

VERSION = 1


def request_key(request: Mapping[str, Any]) -> str:
    """Hexadecimal sha256 of a request: the same for the same content, whatever the order of its fields.

    Only a JSON schema counts in its own order: an answer writes its keys in the order of the schema's.
    """
    return hashlib.sha256(_canonical(_schema_in_order(request))).hexdigest()


class AnswerCache:
    """A folder with one file an answer: `answers/ab/abcd....json`, holding the request, the answer and its hash.

    Written atomically; several processes may share it. Nothing is ever removed: deleting files is safe.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "answers"
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Where the answer to the request of `key` lies."""
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Completion | None:
        """The answer, or None where there is none; a damaged one is warned about (`KoineWarning`) and counts as none."""
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError:
            return self._damaged(path, "it is not UTF-8")
        try:
            entry = json.loads(text)
            answer = entry["answer"]
            if entry["version"] != VERSION or request_key(entry["request"]) != key:
                return self._damaged(path, "it belongs to another request")
            if hashlib.sha256(_canonical(answer)).hexdigest() != entry["sha256"]:
                return self._damaged(path, "its content does not match its hash")
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            return self._damaged(path, f"{type(error).__name__}: {error}")
        return Completion(
            text=answer["text"],
            tokens=(),
            log_probabilities=tuple(answer["log_probabilities"]),
            prompt_tokens=answer["prompt_tokens"],
            finish=answer["finish"],
        )

    def put(self, key: str, request: Mapping[str, Any], completion: Completion) -> None:
        """Keep an answer."""
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

    @staticmethod
    def _damaged(path: Path, why: str) -> None:
        warnings.warn(
            f"{path}: a damaged answer in the cache ({why}); it is asked for again",
            KoineWarning,
            stacklevel=3,
        )


def _schema_in_order(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request with its schema (see `koine.serve.wire.request_body`) as text, which sorting leaves as it is.

    A request from a damaged file may have any form: it goes back as it came, and its hash is another.
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
