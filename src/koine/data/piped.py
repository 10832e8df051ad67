"""Standard input and pipes as data: copied to a file, since data is read more than once."""

from __future__ import annotations

import functools
import io
import os
import shutil
import tempfile
from pathlib import Path

from koine.data.decompression import decompressed
from koine.errors import UserError
from koine.files import disk_errors, hide_temporary_name, is_pipe
from koine.files.streams import descriptor_of

STANDARD_INPUT = "-"
SHOWN = Path("standard input")
_HEAD = 2**16
_MAGIC = {b"PAR1": ".parquet", b"ARROW1": ".arrow", b"\xff\xff\xff\xff": ".arrow", b"ORC": ".orc"}
_COLUMNS = {b"text", b"messages", b"question", b"content"}
"""Columns of which one makes a first line the header of a table."""
_COPIES: dict[tuple[int, int], Path] = {}
_SHOWN: dict[Path, Path] = {}


def is_piped(path: str | Path) -> bool:
    """Return whether a source is standard input (`-`), a pipe or a descriptor (`<(command)`)."""
    return str(path) == STANDARD_INPUT or is_pipe(Path(path))


def local_copy(path: str | Path) -> Path:
    """Return a file with the content of standard input or a pipe; any other path is returned unchanged.

    The copy lies in `TMPDIR` until the process ends, and its content decides how it is read: Parquet, Arrow,
    ORC, JSON, a table whose header has a known column, or plain text; each may be compressed.

    Raises `UserError` where standard input is closed, or the disk of temporary files is full.
    """
    if not is_piped(path):
        return Path(path)
    with _open(path) as source:
        about = os.fstat(source.fileno())
        key = about.st_dev, about.st_ino
        if key not in _COPIES:
            shown = SHOWN if str(path) == STANDARD_INPUT else Path(path)
            copy = _folder() / f"{len(_COPIES)}-{shown.name.replace(' ', '-')}"
            with disk_errors(copy), copy.open("wb") as file:
                shutil.copyfileobj(source, file, 2**20)
            with hide_temporary_name(shown, copy):
                named = copy.with_name(copy.name + _kind(copy))
            copy.rename(named)
            _COPIES[key], _SHOWN[named] = named, shown
        return _COPIES[key]


def shown_name(path: Path) -> Path:
    """Return how messages name a file: of a copy, where it came from."""
    return _SHOWN.get(path, path)


def _open(path: str | Path) -> io.FileIO:
    number = 0 if str(path) == STANDARD_INPUT else descriptor_of(Path(path))
    if number is None:
        return io.FileIO(path)
    try:
        return io.FileIO(os.dup(number))
    except OSError:
        raise UserError(
            "is closed", where=SHOWN if number == 0 else path, hint="give a file, or pipe data to the command"
        ) from None


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="koine-")


def _folder() -> Path:
    return Path(_temporary().name)


def _kind(copy: Path) -> str:
    """Return the extension that says how the content is read."""
    with decompressed(copy) as file:
        head = file.read(_HEAD)
    for magic, extension in _MAGIC.items():
        if head.startswith(magic):
            return extension
    # Without marks of the byte order and the zeros of UTF-16
    start = head.replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")
    if start.startswith((b"{", b"[")):
        return ".jsonl"
    header = start.partition(b"\n")[0]
    for separator, extension in ((b"\t", ".tsv"), (b",", ".csv"), (b";", ".csv"), (b"|", ".csv")):
        cells = {cell.strip(b' "\r').lower() for cell in header.split(separator)}
        if len(cells) > 1 and cells & _COLUMNS:
            return extension
    return ".txt"
