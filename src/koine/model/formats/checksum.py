"""Checksums inside safetensors files, verified when a model is opened, so that damage is found.

The header's `__metadata__` has `sha256`: of the whole file, with these 64 characters as zeros. It is copied
with the file. A library that rewrites the weights drops it, so it is never stale. Files without one are not
checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from koine.errors import UserError
from koine.files import apply_umask
from koine.hardware import usable_cores
from koine.model.formats.safetensors_header import MalformedHeaderError, raw_header

KEY = "sha256"
NO_CHECKSUM = "0" * 64
"""Placeholder until the file is complete; `CheckpointWriter` and `save_file` write it as metadata."""
BLOCK = 8 * 2**20
MOST_REMEMBERED = 4096
"""Most verified files that are remembered."""


def _header(path: Path) -> bytes:
    """Return the bytes of length and header; `b""` for a malformed header."""
    try:
        return raw_header(path)
    except MalformedHeaderError:
        # Opening the file reports the fault.
        return b""


def _place(header: bytes) -> tuple[int, str] | None:
    """Return the checksum's offset in the file (-1 for a malformed one) and its text; None without one."""
    try:
        content = json.loads(header[8:])
    except (ValueError, RecursionError):
        return None
    metadata = content.get("__metadata__") if isinstance(content, dict) else None
    digest = metadata.get(KEY) if isinstance(metadata, dict) else None
    if not isinstance(digest, str):
        return None
    if not re.fullmatch("[0-9a-f]{64}", digest):
        return -1, digest
    # The quoted pair, so that a tensor with such a name is not taken for it.
    found = re.search(rb'"sha256"\s*:\s*"' + digest.encode() + b'"', header)
    return None if found is None else (found.end() - 65, digest)


def _digest(path: Path, place: int) -> str:
    """Compute the sha256 of a file with the 64 characters at `place` as zeros, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(place))
        file.seek(64, os.SEEK_CUR)
        digest.update(NO_CHECKSUM.encode())
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_checksum(path: Path) -> None:
    """Write the checksum of a complete safetensors file into its header.

    A file without space for it is rewritten. Raises `OSError` where the system refuses.
    """
    header = _header(path)
    if _place(header) is None:
        _make_room(path, header)
        header = _header(path)
    _sort_metadata(path, header)
    place = _place(_header(path))
    assert place is not None
    digest = _digest(path, place[0])
    with path.open("r+b") as file:
        file.seek(place[0])
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())


class RunningChecksum:
    """The checksum of a file that is written in order: its tensors are hashed while they are in memory.

    A thread hashes one tensor while the next is computed.

    Args:
        path: a file with length and header, which has `NO_CHECKSUM`.
    """

    def __init__(self, path: Path) -> None:
        header = _header(path)
        place = _place(header)
        assert place is not None
        assert place[1] == NO_CHECKSUM
        self.path, self._place = path, place[0]
        self._digest = hashlib.sha256(header)
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def add(self, data: memoryview) -> None:
        """Add the bytes that follow; they must not change meanwhile."""
        self._wait()
        self._last = self._thread.submit(self._digest.update, data)

    def _wait(self) -> None:
        # At most one tensor waits beside the one that is computed.
        if self._last is not None:
            self._last.result()

    def write(self) -> None:
        """Write the checksum into the header of the complete file."""
        self._wait()
        self._thread.shutdown()
        with self.path.open("r+b") as file:
            file.seek(self._place)
            file.write(self._digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())


def stored_checksum(path: Path) -> str | None:
    """Return the checksum that a file carries; None without one."""
    place = _place(_header(path))
    return None if place is None or place[0] < 0 or place[1] == NO_CHECKSUM else place[1]


def _sort_metadata(path: Path, header: bytes) -> None:
    """Sort the keys of the metadata, so that the same weights give the same bytes.

    The library writes them in another order at every run.
    """
    found = re.search(rb'"__metadata__":(\{[^{}]*\})', header)
    if found is None:
        return
    ordered = json.dumps(
        json.loads(found[1]), ensure_ascii=False, sort_keys=True, separators=(",", ":")
    ).encode()
    if len(ordered) == len(found[1]) and ordered != found[1]:
        with path.open("r+b") as file:
            file.seek(found.start(1))
            file.write(ordered)


def write_checksums(folder: Path) -> None:
    """Write the checksum of every safetensors file of a model folder, before it is published.

    The library that wrote them made them readable by their owner only; they get the umask's permissions.
    """
    for path in sorted(folder.glob("*.safetensors")):
        write_checksum(path)
        apply_umask(path)


def _make_room(path: Path, header: bytes) -> None:
    content = json.loads(header[8:])
    content["__metadata__"] = {**content.get("__metadata__", {}), KEY: NO_CHECKSUM}
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with path.open("rb") as old, temporary.open("wb") as new:
            old.seek(len(header))
            new.write(struct.pack("<Q", len(text)) + text)
            while block := old.read(BLOCK):
                new.write(block)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def verify_checksums(files: Iterable[Path]) -> None:
    """Compare weight files with the checksums in their headers.

    Verified files are remembered and not read again. Raises `UserError` with the name of a damaged file.
    """
    todo = [path for path in files if path.suffix == ".safetensors"]
    if len(todo) == 1:
        _verify(todo[0])
    elif todo:
        # Hashing releases the interpreter's lock.
        with ThreadPoolExecutor(min(len(todo), usable_cores())) as pool:
            list(pool.map(_verify, todo))


def _verify(path: Path) -> None:
    place = _place(_header(path))
    if place is None or place[1] == NO_CHECKSUM:
        return
    state = _state(path)
    if _is_remembered(state):
        return
    if place[0] < 0 or _digest(path, place[0]) != place[1]:
        raise UserError(
            "does not match the sha256 that it carries; it is damaged",
            where=path,
            hint="copy it again, or build it again",
        )
    # A file that changed while it was read is not remembered.
    if _state(path) == state:
        _remember(state)


def _state(path: Path) -> str:
    """Return a hash of a file's path, size, times and inode."""
    about = path.stat()
    state = (
        str(path.resolve()),
        about.st_size,
        about.st_mtime_ns,
        about.st_ctime_ns,
        about.st_ino,
        about.st_dev,
    )
    return hashlib.sha256(repr(state).encode(errors="surrogateescape")).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koine" / "whole-weights"


def _is_remembered(state: str) -> bool:
    try:
        return (_folder() / state).is_file()
    except (OSError, RuntimeError):
        return False


def _remember(state: str) -> None:
    # Without a writable folder (no home, a read-only or full disk) the file is read again next time.
    with contextlib.suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / state).touch()
        entries = list(folder.iterdir())
        if len(entries) > MOST_REMEMBERED:
            entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
            for entry in entries[: MOST_REMEMBERED // 4]:
                entry.unlink(missing_ok=True)
