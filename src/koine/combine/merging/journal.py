"""The journal of a merge: which tensors are on the disk, so that an interrupted merge can go on.

The file only grows. It may end anywhere when the process or the machine does. Its first line names the
fingerprint of the merge; each later one maps names of tensors to `{"figures": ..., "seal": checksum}`.
"""

from __future__ import annotations

import json
import os
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from koine.files import parse_json
from koine.model.formats.safetensors_stream import CheckpointWriter

Entries = dict[str, dict[str, Any]]


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines, and cut off an incomplete end, so that new lines begin after it."""
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    good = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            content = parse_json(line.decode("utf-8")) if line.endswith(b"\n") else None
        except ValueError:
            content = None
        if not isinstance(content, dict):
            # A power cut may also leave zeros where a line was to be: nothing behind them counts.
            os.truncate(path, good)
            break
        good += len(line)
        found.append(content)
    return found


def read_entries(path: Path, fingerprint: str) -> Entries | None:
    """Return the journal's entries; None where it is of another merge, or there is none."""
    lines = read_journal(path)
    if not lines or lines[0].get("fingerprint") != fingerprint:
        return None
    return {name: entry for line in lines[1:] for name, entry in line.items()}


def is_written(writer: CheckpointWriter, name: str, entry: Any) -> bool:
    """Return whether the output file holds the bytes that a journal's entry names.

    Files may have been lost, cut or changed while no merge ran.
    """
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("figures"), dict)
        and entry.get("seal") == _seal(entry["figures"], writer.checksum(name))
    )


def _seal(figures: dict[str, Any], checksum: int) -> int:
    """Return a checksum over a tensor's bytes and its figures."""
    return zlib.crc32(json.dumps(figures, sort_keys=True).encode(), checksum)


class Journal:
    """Enter finished tensors, a batch at a time, while the next ones are merged.

    A thread of its own syncs the weights, then writes and syncs the line that names them. Leaving the context
    enters the rest, also after an error.

    Args:
        path: The file, which is continued.
        fingerprint: Of the merge, for the first line.
        writer: Of the weights.
        sync_bytes: Bytes of weights, at least, between two lines.
    """

    def __init__(self, path: Path, fingerprint: str, writer: CheckpointWriter, *, sync_bytes: int) -> None:
        self._writer, self._sync_bytes = writer, sync_bytes
        self._lock, self._waiting, self._waiting_bytes = threading.Lock(), Entries(), 0
        self._file = path.open("a")
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        if not path.stat().st_size:
            self._file.write(json.dumps({"fingerprint": fingerprint}) + "\n")
            self._file.flush()

    def add(self, name: str, figures: dict[str, Any]) -> None:
        """Enter a tensor that was written, now or with one of the next."""
        seal = _seal(figures, self._writer.checksum(name))
        with self._lock:
            self._waiting[name] = {"figures": figures, "seal": seal}
            self._waiting_bytes += self._writer.entries[name].nbytes
            if self._waiting_bytes >= self._sync_bytes and (self._last is None or self._last.done()):
                self._wait()
                # The disk works while the next tensors are merged.
                self._last = self._thread.submit(self._write, self._waiting)
                self._waiting, self._waiting_bytes = {}, 0

    def _write(self, entries: Entries) -> None:
        self._writer.sync()
        self._file.write(json.dumps(entries) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _wait(self) -> None:
        """Wait for the last batch; raise what went wrong there."""
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait()
            if self._waiting:
                self._write(self._waiting)
        finally:
            self._thread.shutdown()
            self._file.close()
