"""Fingerprints of files and folders by content, remembered so that nothing unchanged is read twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import explain, parse_json, sha256_file, walk, write_json

# A file touched this recently could change again without a new time stamp, so its hash is not remembered.
SETTLED_SECONDS = 2.0


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`; names of files that are no UTF-8 count too."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def stamp(about: os.stat_result) -> list[int]:
    """Stamp of a file's state: size, times of its content and of its entry, inode.

    The time of the entry cannot be set back, as `cp -p` and archives do with that of the content.
    """
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


class ContentCache:
    """sha256 of files, remembered by path and `stamp` in one JSON file."""

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
        """sha256 of the file's content, from memory where its stamp is as it was."""
        about = path.stat()
        before = stamp(about)
        known = self.entries.get(str(path))
        if isinstance(known, list) and known[:-1] == before:
            return str(known[-1])
        value = sha256_file(path)
        # A clock that was set back makes files of the future: they have settled as well.
        if abs(time.time() - about.st_mtime) > SETTLED_SECONDS and stamp(path.stat()) == before:
            self.entries[str(path)] = [*before, value]
            self.changed = True
        return value

    def save(self) -> None:
        """Write what was learnt, where anything was."""
        if self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.entries)
            self.changed = False


def fingerprint_of_content(path: Path, cache: ContentCache | None = None) -> str:
    """sha256 over the relative names and contents of a file, or of the files that `koine.files.walk` finds in
    a folder.

    These are the files that readers of data see too: through links, without hidden ones. A link to nothing
    counts by its name.

    Raises `UserError` where it does not exist or cannot be read.
    """
    hash_of = sha256_file if cache is None else cache.sha256
    try:
        if path.is_file():
            return hash_of(path)
        if not path.exists():
            raise UserError("no such file or folder", where=path)
        if not path.is_dir():
            raise UserError("neither a file nor a folder", where=path, hint="write it to a file first")
        return digest(
            [
                [file.relative_to(path).as_posix(), hash_of(file) if file.exists() else None]
                for file in walk(path)
            ]
        )
    except PermissionError as error:
        raise UserError(
            "cannot be read", where=error.filename or path, hint="check its permissions"
        ) from None
    except OSError as error:
        raise explain(error, path) or error from error
