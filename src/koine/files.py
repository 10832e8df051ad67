"""Files and folders that are either whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from koine.errors import UserError
from koine.json_files import parse_json, read_json, read_json_object

__all__ = [
    "atomic_directory", "disk_errors", "exclusive", "fsync_directory", "fsync_file", "fsync_tree", "parse_json", "publish_directory",
    "read_json", "read_json_object", "refuse_inside", "sha256_file", "write_atomically", "write_json",
]  # fmt: skip


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a read-only place and a missing permission into the line that the user needs."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                "the disk is full",
                where=path,
                mend="free some space or choose another place; nothing half-written was kept",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                "cannot write here", where=path, mend="choose a folder that you may write to"
            ) from error
        if error.errno == errno.ENOENT and _beside(error.filename, path):
            # `/proc`, or a folder that another process has removed meanwhile; what is missing elsewhere is another matter.
            raise UserError(
                "no file can be made here",
                where=error.filename or path,
                mend="choose another place, and leave the folder alone while this runs",
            ) from error
        if error.errno == errno.EISDIR:
            raise UserError(
                "a folder stands where a file must go",
                where=error.filename or path,
                mend="choose another place or remove the folder",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                "a file stands where a folder must go",
                where=error.filename or path,
                mend="choose another place or remove the file",
            ) from error
        raise


def _beside(filename: object, path: Path) -> bool:
    """Whether a system's error is about `path`, what is below it, or what is written beside it first."""
    return isinstance(filename, str) and Path(filename).absolute().is_relative_to(path.absolute().parent)


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make what was written to `path` survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_tree(path: Path) -> None:
    """fsync every file and folder below `path`, in which nobody else may be writing."""
    for folder, _, names in os.walk(path):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_directory(Path(folder))


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False) + "\n")


@contextmanager
def atomic_directory(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes `out`, on failure it is removed and `out` is as before.

    Raises `UserError` where `out` exists already (unless `overwrite`) or cannot be written.
    """
    out = Path(out)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists already", where=out, mend="choose another --out or remove it first")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            fsync_tree(temporary)
            publish_directory(temporary, out)
        except UserError as error:
            # The user knows `out`, not the folder beside it.
            if error.where is not None and error.where.startswith(str(temporary)):
                raise UserError(error.what, where=out, mend=error.mend) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def refuse_inside(out: Path, folders: Iterable[Path]) -> None:
    """Raise `UserError` where a new folder would lie inside one of those that it is made from."""
    place = out.resolve()
    for folder in folders:
        if folder.resolve() in place.parents:
            raise UserError(
                f"lies inside {folder}, which is read", where=out, mend="choose another --out, beside it"
            )


def publish_directory(temporary: Path, out: Path) -> None:
    """Rename a finished folder to `out`, replacing what was there."""
    if out.exists():
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old)
    else:
        temporary.rename(out)
    fsync_directory(out.parent)


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(path: Path, *, doing: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`; after `wait` seconds (-1: for ever) another holder is reported as a `UserError`.

    The operating system frees the lock when its holder dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise UserError(
            f"another process is {doing}", where=path, mend="wait for it to end, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
