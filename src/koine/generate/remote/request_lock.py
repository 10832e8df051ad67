"""Locks on calls: of all processes and threads on one cache, one at a time asks."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from koine.files import disk_errors


class RequestLock:
    """The right to ask for one answer.

    The operating system gives it back when its holder dies, however it dies.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"{key}.lock"
        self._lock = FileLock(str(self._path))

    def acquire(self) -> bool:
        """Take it where nobody holds it. Raises `UserError` where the folder cannot be written to."""
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        """Give it back, and leave no file."""
        # Before the lock goes: who waits with the removed file open sees that it has no name, and begins
        # anew. Some systems remove no open file: an empty one stays.
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._lock.release()
