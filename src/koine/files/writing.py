"""Write single files atomically, and sync them to the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO

from koine.errors import UserError
from koine.files.streams import is_stream, write_through
from koine.files.system_errors import disk_errors

PARTIAL = re.compile(r"\..+\.\d+\.partial", re.DOTALL)
"""Names of files being written, or left by a killed process: `.NAME.PID.partial`."""
MAX_NAME_BYTES = 255  # of nearly every file system


def beside(path: Path, ending: str) -> Path:
    """Return `.NAME.ENDING` in the same folder; a name that is too long is cut, and ends in a hash."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        name = f".{path.name[:40]}-{digest}.{ending}"
    return path.with_name(name)


def fsync_directory(path: Path) -> None:
    """Sync a folder, so that a rename inside survives a power cut (where file systems sync folders)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Sync a file, so that its content survives a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_tree(path: Path) -> None:
    """Sync every file and folder below `path`, where no one else may write. Links are not followed."""

    def refuse(error: OSError) -> None:
        raise error

    for folder, _, names in os.walk(path, onerror=refuse):
        for name in names:
            file = Path(folder) / name
            if stat.S_ISREG(file.lstat().st_mode):
                fsync_file(file)
        fsync_directory(Path(folder))


def apply_umask(path: Path) -> None:
    """Give a file the permissions that `open` gives a new one in its folder.

    Libraries that write a temporary file and rename it leave it readable by its owner only.
    """
    probe = beside(path, f"{os.getpid()}.partial")
    try:
        with probe.open("wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)
    path.chmod(mode)


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def clear_partials(folder: Path, *, below: bool = True) -> None:
    """Remove half-written files and locks of killed processes in a folder that only the caller uses.

    Args:
        folder: Where.
        below: Also in the folders inside it.
    """
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place) / name
            lock = (
                name.startswith(".") and name.endswith(".lock") and path.is_file() and not path.stat().st_size
            )
            if lock or PARTIAL.fullmatch(name):
                remove(path)
        folders[:] = [name for name in folders if not PARTIAL.fullmatch(name)] if below else []


def clear_abandoned(*folders: Path) -> None:
    """Remove the temporary files in these folders that no process is writing any more.

    Other processes may write there: a file that is being written is locked.
    """
    for folder in folders:
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if PARTIAL.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), Path(entry.path).open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(entry.path).unlink()


def _opened(temporary: Path) -> BinaryIO:
    """Open a temporary file, locked so that `clear_abandoned` leaves it alone."""
    while True:
        file = temporary.open("wb")
        # Where there are no locks, nothing is removed either.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():
            return file
        file.close()


def encoded(text: str) -> bytes:
    """Encode as UTF-8; lone surrogates (bytes of a path) become `\\udcff`, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    A link stays, and its target is written. Pipes, character devices and descriptors are written through.

    Raises:
        UserError: The system refuses, or `path` is a folder, a disk or a socket.
        BrokenPipeError: The reader of a pipe has gone.
    """
    data = encoded(content) if isinstance(content, str) else content
    if is_stream(path):
        write_through(path, data)
        return
    with disk_errors(path):
        target = real_file(path)
        temporary = beside(target, f"{os.getpid()}.partial")
        try:
            with _opened(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(target.parent)


def real_file(path: Path) -> Path:
    """Resolve the path of a file to be written, following links.

    Raises `UserError` for a folder, and for what must never be replaced: a disk, a socket, a pipe.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    if stat.S_ISREG(mode):
        return target
    if stat.S_ISDIR(mode):
        raise UserError("a folder", where=path, hint="give the name of a file")
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a disk",
        stat.S_IFLNK: "a link that leads back to itself",
    }
    raise UserError(
        f"{kinds.get(stat.S_IFMT(mode), 'no file')}, which is not replaced",
        where=path,
        hint="give the name of a file",
    )


def to_json(value: Any) -> str:
    """Return indented JSON, in the order given."""
    return json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    write_atomically(path, to_json(value))


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
