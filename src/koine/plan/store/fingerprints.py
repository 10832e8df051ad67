"""Fingerprints of files and folders by content, cached so that unchanged files are not read twice."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import explain, parse_json, sha256_file, walk, write_json

# A file changed this recently could change again within the same time stamp, so its hash is not cached.
SETTLED_SECONDS = 2.0


def digest(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`; file names that are not UTF-8 are allowed."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def stamp(about: os.stat_result) -> list[int]:
    """Return the stamp of a file's state: size, mtime, ctime, inode.

    `cp -p` and archives set mtime back; ctime cannot be set.
    """
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


class ContentCache:
    """A cache of the sha256 of files, by path and `stamp`, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.changed = False
        self.entries: dict[str, list[Any]] = {}
        try:
            loaded = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # The cache only saves time: a missing or damaged one starts empty.
            loaded = {}
        if isinstance(loaded, dict):
            self.entries = loaded

    def sha256(self, path: Path) -> str:
        """Return the sha256 of a file's content, from the cache if its stamp is unchanged."""
        about = path.stat()
        before = stamp(about)
        known = self.entries.get(str(path))
        if isinstance(known, list) and known[:-1] == before:
            return str(known[-1])
        value = sha256_file(path)
        # After the clock was set back, a file may have a time in the future: it has settled as well.
        if abs(time.time() - about.st_mtime) > SETTLED_SECONDS and stamp(path.stat()) == before:
            self.entries[str(path)] = [*before, value]
            self.changed = True
        return value

    def save(self) -> None:
        """Write the cache if it has changed."""
        if self.changed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.entries)
            self.changed = False


def fingerprint_of_content(path: Path, cache: ContentCache | None = None) -> str:
    """Return the sha256 of a file, or over the relative names and contents of a folder's files.

    The files are those that readers of data see (`koine.files.walk`): through links, without hidden ones. A
    broken link counts by its name.

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
