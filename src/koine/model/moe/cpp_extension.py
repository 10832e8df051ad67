"""C++ of ours, compiled on the machine it runs on the first time that it is needed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from pathlib import Path

from koine.errors import KoineWarning
from koine.hardware import compiler, processor_flags

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled source; None on a machine that cannot compile or run it, with a warning where its compiler failed.

    Needs Linux, AVX-512 and g++ (another compiler would bring threads of its own beside torch's). The result is kept in `$XDG_CACHE_HOME/koine`
    (`~/.cache/koine`), under a name that stands for source, compiler and processor; where nothing can be kept or loaded there it is compiled for this process.
    """
    gxx = compiler()
    if platform.system() != "Linux" or "avx512f" not in processor_flags() or gxx is None:
        return None
    try:
        told = subprocess.run([gxx, "--version"], capture_output=True, text=True, check=False).stdout
        if "Free Software Foundation" not in told:
            return None
        return _loaded(gxx, source, f"{source.stem}-{_digest(source, told)}.so")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{gxx} could not compile {source.name} ({reason[0] if reason else error}); going on without, more slowly",
            KoineWarning,
            stacklevel=2,
        )
        return None


def _digest(source: Path, told: str) -> str:
    """Of all that the compiled code depends on. told: the compiler's version."""
    said = "\n".join([source.read_text(), told, *FLAGS, *sorted(processor_flags())])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _loaded(gxx: str, source: Path, name: str) -> ctypes.CDLL:
    kept = _kept_folder()
    # Twice, because a file that was there may be damaged.
    for _ in range(2 if kept else 0):
        assert kept is not None
        try:
            return ctypes.CDLL(str(_built(gxx, source, kept / name)))
        except OSError:
            (kept / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return ctypes.CDLL(str(_built(gxx, source, Path(folder) / name)))


def _kept_folder() -> Path | None:
    """Where compiled code is kept; None where there is no such folder that this user alone may write."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koine"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    ours = about.st_uid == os.geteuid() and not about.st_mode & 0o022
    return folder if ours and os.access(folder, os.W_OK) else None


def _built(gxx: str, source: Path, target: Path) -> Path:
    """Compiles to a file beside the target, which appears whole or not at all and is never changed: several processes, on several machines, may do so at once."""
    if not target.is_file():
        descriptor, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
        try:
            command = [gxx, *FLAGS, "-o", partial, str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.fsync(descriptor)
            with contextlib.suppress(FileExistsError):
                target.hardlink_to(partial)
        finally:
            os.close(descriptor)
            Path(partial).unlink(missing_ok=True)
    return target
