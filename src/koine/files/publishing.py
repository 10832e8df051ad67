"""Rename a finished folder to its place, and see whether the place changed meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import warnings
from pathlib import Path

from koine.errors import KoineWarning, UserError
from koine.files.writing import beside, fsync_directory, fsync_tree, remove

State = frozenset[tuple[str, int, int, int]]
"""State of a file or folder: of everything below, relative name, inode, bytes and modification time.

Bytes and time are 0 for folders.
"""

ANY = frozenset({("", -1, -1, -1)})
"""The state of a place where only we write, so that anything there may be replaced."""

OTHER_OUT = "choose another --out"


def state_of(path: Path) -> State | None:
    """Read the state of a file or folder; None for nothing. Links are not followed."""
    try:
        about = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(about.st_mode):
        return frozenset({("", about.st_ino, about.st_size, about.st_mtime_ns)})
    found = {("", about.st_ino, 0, 0)}
    for folder, folders, files in os.walk(path):
        for name in [*folders, *files]:
            item = Path(folder) / name
            about = item.lstat()
            shown = (0, 0) if stat.S_ISDIR(about.st_mode) else (about.st_size, about.st_mtime_ns)
            found.add((str(item.relative_to(path)), about.st_ino, *shown))
    return frozenset(found)


def changed_error(out: Path) -> UserError:
    """Return the error for an output that another process wrote meanwhile."""
    return UserError(
        "appeared or changed while this ran, and is left as it is",
        where=out,
        hint=f"{OTHER_OUT} and run it again",
    )


def publish_directory(
    temporary: Path, out: Path, *, found: State | None = ANY, where: Path | None = None
) -> None:
    """Rename a finished folder to `out`, replacing only what stood there at the start.

    A link is followed, to another file system too. A kill in between leaves what was there as
    `.NAME.PID.old`, which `koine.files.recover` restores.

    Args:
        temporary: The finished folder.
        out: Its new path.
        found: What stood at `out` at the start; default: whatever stands there.
        where: What an error is about; default: `out`.

    Raises:
        UserError: Something else than `found` stands at `out` by now.
    """
    place = Path(os.path.realpath(out)) if out.is_symlink() else out
    where = where or out
    now = state_of(place)
    if now is not None and found not in (ANY, now):
        raise changed_error(where)
    temporary = _same_file_system(temporary, place)
    if now is None or (place.is_dir() and not any(place.iterdir())):
        _rename(temporary, place, where)
        try:
            fsync_directory(place.parent)
        except OSError:
            # The rename would not survive a power cut: undo it.
            place.rename(temporary)
            raise
        return
    old = beside(place, f"{os.getpid()}.old")
    place.rename(old)
    try:
        if found not in (ANY, state_of(old)):
            raise changed_error(where)
        _rename(temporary, place, where)
        fsync_directory(place.parent)
    except (OSError, UserError):
        if not os.path.lexists(temporary) and os.path.lexists(place):
            place.rename(temporary)
        if not os.path.lexists(place):
            old.rename(place)
        raise
    try:
        remove(old)
    except OSError as error:
        warnings.warn(
            f"{old}: cannot be removed ({error.strerror}); remove it yourself", KoineWarning, stacklevel=2
        )


def _rename(temporary: Path, place: Path, where: Path) -> None:
    """Rename a folder; one that is not empty is never replaced."""
    try:
        temporary.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and os.path.lexists(place):
            raise changed_error(where) from None
        if error.errno != errno.EXDEV or temporary.parent == place.parent:
            raise
        # Bind mounts and project quotas divide what looks like one file system.
        _copied_beside(temporary, place).rename(place)


def _same_file_system(temporary: Path, place: Path) -> Path:
    """Return the finished folder, or a copy beside `place` where that is on another file system."""
    if temporary.stat().st_dev == place.parent.stat().st_dev:
        return temporary
    return _copied_beside(temporary, place)


def _copied_beside(temporary: Path, place: Path) -> Path:
    """Move a finished folder beside `place` by copying it."""
    copy = beside(place, f"{os.getpid()}.partial")
    try:
        shutil.copytree(temporary, copy, symlinks=True)
        fsync_tree(copy)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    shutil.rmtree(temporary)
    return copy
