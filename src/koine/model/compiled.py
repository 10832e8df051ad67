"""C++ of ours, compiled on the machine it runs on the first time that it is needed."""

from __future__ import annotations

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
    (`~/.cache/koine`), under a name that stands for source, compiler and processor; where that cannot be written it is compiled for this process alone.
    """
    gxx = compiler()
    if platform.system() != "Linux" or "avx512f" not in processor_flags() or gxx is None:
        return None
    told = subprocess.run([gxx, "--version"], capture_output=True, text=True, check=False).stdout
    if "Free Software Foundation" not in told:
        return None
    said = "\n".join([source.read_text(), told, *FLAGS, *sorted(processor_flags())])
    name = f"{source.stem}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    try:
        kept = _kept_folder()
        if kept is not None:
            return ctypes.CDLL(str(_built(gxx, source, kept / name)))
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_built(gxx, source, Path(folder) / name)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"{gxx} could not compile {source.name} ({reason[0] if reason else error}); going on without, more slowly",
            KoineWarning,
            stacklevel=2,
        )
        return None


def _kept_folder() -> Path | None:
    """Where compiled code is kept; None where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koine"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _built(gxx: str, source: Path, target: Path) -> Path:
    """Compiles to a file beside the target, which appears whole or not at all: several processes may do so at once."""
    if not target.is_file():
        descriptor, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(descriptor)
        try:
            command = [gxx, *FLAGS, "-o", partial, str(source)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            Path(partial).replace(target)
        finally:
            Path(partial).unlink(missing_ok=True)
    return target
