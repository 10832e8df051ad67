"""Fingerprints of files and folders by content, remembered so that nothing unchanged is read twice."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import parse_json, sha256_file, write_json

# A file touched this recently could change again without a new modification time, so its hash is not remembered.
SETTLED_SECONDS = 2.0


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ContentCache:
    """sha256 of files, remembered by path, size and modification time in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        self.entries: dict[str, list[Any]] = {}
        try:
            loaded = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # The cache only saves time: one that is missing or damaged is made anew.
            loaded = {}
        if isinstance(loaded, dict):
            self.entries = loaded

    def sha256(self, path: Path) -> str:
        """sha256 of the file's content, from memory where size and modification time are as they were."""
        before = path.stat()
        known = self.entries.get(str(path))
        if known is not None and known[:2] == [before.st_size, before.st_mtime_ns]:
            return str(known[2])
        value = sha256_file(path)
        if time.time() - before.st_mtime > SETTLED_SECONDS:
            self.entries[str(path)] = [before.st_size, before.st_mtime_ns, value]
            self.changed = True
        return value

    def save(self) -> None:
        """Write what was learnt, where anything was."""
        if self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.entries)
            self.changed = False


def fingerprint_of_content(path: Path, cache: ContentCache | None = None) -> str:
    """sha256 over the relative names and contents of a file or folder.

    Raises `UserError` where it does not exist or cannot be read.
    """
    if not path.exists():
        raise UserError("no such file or folder", where=path)
    hash_of = sha256_file if cache is None else cache.sha256
    try:
        if path.is_file():
            return hash_of(path)
        files = sorted(item for item in path.rglob("*") if item.is_file())
        return digest([[item.relative_to(path).as_posix(), hash_of(item)] for item in files])
    except PermissionError as error:
        raise UserError(
            "cannot be read", where=error.filename or path, mend="check its permissions"
        ) from None
