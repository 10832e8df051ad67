"""Standard output, pipes and devices as outputs: they are written through, never replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from koine.errors import KoineWarning, UserError
from koine.files.system_errors import disk_errors

STANDARD_OUTPUT = Path("/dev/stdout")
OTHER_FILE = "give the name of a file"
MAX_LINKS = 40
"""Links that are followed one after another; the system's own limit."""
BLOCK = 2**20


def descriptor_of(path: Path) -> int | None:
    """Return N where a path leads to `/dev/fd/N`, as `/dev/stdout` does; None for any other path.

    Such a path is not opened again: that would write a regular file from its beginning.
    """
    folders = {os.path.realpath("/dev/fd"), os.path.realpath("/proc/self/fd")}
    for _ in range(MAX_LINKS):
        if path.name.isdecimal() and os.path.realpath(path.parent) in folders:
            return int(path.name)
        try:
            path = path.parent / path.readlink()
        except OSError:
            return None
    return None


def is_stream(path: Path) -> bool:
    """Return whether a path leads to an open descriptor, a pipe or a character device."""
    if descriptor_of(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def is_pipe(path: Path) -> bool:
    """Return whether a path leads to an open descriptor or a named pipe, which can be read once."""
    if descriptor_of(path) is not None:
        return True
    try:
        return stat.S_ISFIFO(path.stat().st_mode)
    except OSError:
        return False


def is_standard_output(path: Path) -> bool:
    """Return whether what is written to `path` arrives where standard output goes."""
    number = descriptor_of(path)
    if number == 1:
        return True
    try:
        about = path.stat() if number is None else os.fstat(number)
        return stat.S_ISFIFO(about.st_mode) and os.path.samestat(about, os.fstat(1))
    except OSError:
        return False


def check_stream(path: Path) -> None:
    """Raise `UserError` where a pipe, a device or a descriptor cannot be written."""
    number = descriptor_of(path)
    if number is None:
        if not os.access(path, os.W_OK):
            raise UserError("cannot be written", where=path, hint="check its permissions")
        return
    try:
        mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        raise UserError(
            "is not open", where=path, hint=f"open it in the shell ({number}>FILE), or {OTHER_FILE}"
        ) from None
    if mode == os.O_RDONLY:
        raise UserError("is open for reading only", where=path, hint=OTHER_FILE)


def open_stream(path: Path) -> int:
    """Open a pipe, a device or a descriptor for writing; return a descriptor of our own.

    A named pipe is opened once a program reads from it; a note says that we wait.
    """
    check_stream(path)
    number = descriptor_of(path)
    if number is not None:
        return os.dup(number)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        warnings.warn(f"{path}: waiting for a program that reads from it", KoineWarning, stacklevel=3)
        return os.open(path, os.O_WRONLY | os.O_NOCTTY)
    os.set_blocking(descriptor, True)
    return descriptor


def write_through(path: Path, content: bytes) -> None:
    """Write bytes to a pipe, a device or a descriptor. Raises `BrokenPipeError` if its reader has gone."""
    with disk_errors(path):
        descriptor = open_stream(path)
        try:
            _write(descriptor, content)
        finally:
            os.close(descriptor)


@contextmanager
def spooled(path: Path) -> Iterator[Path]:
    """Yield a temporary file to fill; on success it is written to a pipe, a device or a descriptor.

    After an error nothing is written, and a reader sees the end of the pipe. The file lies in `TMPDIR`.

    Raises:
        UserError: The place cannot be written, or the disk of temporary files is full.
        BrokenPipeError: The reader of the pipe has gone.
    """
    with disk_errors(path):
        descriptor = open_stream(path)
    try:
        with tempfile.TemporaryDirectory(prefix="koine-") as folder:
            temporary = Path(folder) / (path.name or "output")
            with _errors_of_spooling(path, Path(folder)), disk_errors(temporary):
                yield temporary
            with disk_errors(path), temporary.open("rb") as file:
                while block := file.read(BLOCK):
                    _write(descriptor, block)
    finally:
        os.close(descriptor)


@contextmanager
def _errors_of_spooling(path: Path, folder: Path) -> Iterator[None]:
    """Report errors about the temporary file as errors about the folder of temporary files."""
    try:
        yield
    except UserError as error:
        if error.where is None or not error.where.startswith(str(folder)):
            raise
        raise UserError(
            f"{error.what}, and {path} is collected here before it is written",
            where=folder.parent,
            hint="set TMPDIR to a folder with more space",
        ) from error


def _write(descriptor: int, content: bytes) -> None:
    """Write all bytes, also to a descriptor that does not block."""
    left = memoryview(content)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            select.select([], [descriptor], [])
