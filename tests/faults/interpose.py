"""The library between a command and the system: compile and control it."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("interpose.c")
VARIABLE = "KOINE_FAULTS_CONTROL"
KINDS = {
    "open": 1,
    "write": 2,
    "rename": 4,
    "link": 8,
    "unlink": 16,
    "mkdir": 32,
    "fsync": 64,
    "truncate": 128,
    "map": 256,
}
NUMBERS = (
    "count",
    "kill_at",
    "torn",
    "fail_at",
    "fail_errno",
    "fail_later",
    "stop_at",
    "stopped",
    "go_on",
    "reached",
)
PROCESSES = 128
LONGEST = 4096  # PATH_MAX


class NoCompilerError(Exception):
    """There is no compiler for the library, so faults cannot be injected."""


def library() -> Path:
    """Compile the library once, into a cache folder of this user."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or os.uname().sysname != "Linux":
        raise NoCompilerError("a C compiler and Linux are needed to stand between a command and the system")
    folder = Path(tempfile.gettempdir()) / f"koine-faults-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise NoCompilerError(f"{folder} belongs to somebody else")
    file = folder / f"interpose-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}.so"
    if not file.exists():
        made = file.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-O2", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl", "-lpthread"], check=True
        )
        made.replace(file)
    return file


class Control:
    """The mapped file that the library reads: what happens at which call, and the count of calls."""

    def __init__(self, path: Path, *, root: Path, log: Path | None = None, **numbers: int) -> None:
        self.path = path
        size = 8 * (len(NUMBERS) + PROCESSES)
        with path.open("w+b") as file:
            file.truncate(size + 2 * LONGEST)
            self._map = mmap.mmap(file.fileno(), 0)
        for name, number in numbers.items():
            self.set(name, number)
        for offset, text in ((size, f"{root}/"), (size + LONGEST, "" if log is None else str(log))):
            encoded = os.fsencode(text) + b"\0"
            self._map[offset : offset + len(encoded)] = encoded

    def set(self, name: str, number: int) -> None:
        struct.pack_into("<q", self._map, 8 * NUMBERS.index(name), number)

    def get(self, name: str) -> int:
        return int(struct.unpack_from("<q", self._map, 8 * NUMBERS.index(name))[0])

    def processes(self) -> list[int]:
        """Ids of the processes that are attached and have not ended by themselves."""
        return [one for one in struct.unpack_from(f"<{PROCESSES}q", self._map, 8 * len(NUMBERS)) if one]

    def close(self) -> None:
        self._map.close()


def attach(path: Path) -> None:
    """Count calls in this process; its children do so through the environment variable."""
    os.environ[VARIABLE] = str(path)
    failed = ctypes.CDLL(None).faults_attach(os.fsencode(path))
    if failed:
        raise OSError(failed, os.strerror(failed), str(path))
