"""Lock files: freed by the system when their holder dies, and removed afterwards."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from koine.errors import KoineWarning, UserError

POLL_SECONDS = 0.05
# Errors of file systems without locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
OTHER_PLACE = "wait for it to end, or choose another folder"


@contextmanager
def exclusive(
    path: Path,
    *,
    doing: str,
    wait: float = 0.0,
    where: Path | None = None,
    hint: str = OTHER_PLACE,
    waiting: Callable[[], None] | None = None,
) -> Iterator[bool]:
    """Hold the lock file `path` and remove it afterwards; yield whether the file system has locks.

    The operating system frees the lock when its holder dies, however it dies.

    Args:
        path: The lock file.
        doing: What the holder does, for the message: "another process is {doing}".
        wait: Seconds to wait for another holder; -1: for ever.
        where: What the error is about; default: `path`.
        hint: How to fix it.
        waiting: Called once before it waits.

    Raises:
        UserError: Another process still holds the lock after `wait` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, wait, waiting)
    if descriptor is None:
        raise UserError(f"another process is {doing}", where=where or path, hint=hint)
    try:
        yield descriptor >= 0
    finally:
        if descriptor >= 0:
            _release(path, descriptor)


def _acquire(path: Path, wait: float, waiting: Callable[[], None] | None) -> int | None:
    """Return the descriptor of the locked file.

    None where another process holds it too long, -1 where the file system has no locks.
    """
    end = time.monotonic() + wait
    called = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS:
                warnings.warn(
                    f"{path.parent}: this file system has no locks; "
                    "do not write here from two processes at once",
                    KoineWarning,
                    stacklevel=4,
                )
                path.unlink(missing_ok=True)
                return -1
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if wait >= 0 and time.monotonic() >= end:
                return None
            if waiting is not None and not called:
                called = True
                waiting()
            time.sleep(POLL_SECONDS)
            continue
        if _is_open_file(path, descriptor):
            return descriptor
        # The former holder removed the file while we opened it. The lock of a removed file excludes nobody.
        os.close(descriptor)


def _is_open_file(path: Path, descriptor: int) -> bool:
    """Return whether `path` is still the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(path: Path, descriptor: int) -> None:
    """Remove the file while it is locked, so that others who opened it see that it is gone; then unlock."""
    try:
        # A file with content is another file of this name.
        if _is_open_file(path, descriptor) and os.fstat(descriptor).st_size == 0:
            # The work under the lock is done: an empty file that cannot be removed does no harm.
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)
