"""Locks on requests: one process or thread at a time sends a request."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from koine.files import disk_errors


class RequestLock:
    """A file lock on one request. The operating system releases it when its process ends, however it ends."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"{key}.lock"
        self._lock = FileLock(str(self._path))

    def acquire(self) -> bool:
        """Take the lock; return False where it is taken.

        Raises `UserError` where the folder cannot be written.
        """
        with disk_errors(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                return False
        return True

    def release(self) -> None:
        """Release the lock, and remove its file."""
        # Removed before the lock is released: a process that waits with the removed file open sees that it
        # has no name, and starts again. Some systems do not remove open files: there an empty one remains.
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
        self._lock.release()
