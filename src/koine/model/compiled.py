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
    "-fopenmp",
    "-shared",
    "-fPIC",
)


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled source; None, once with a warning where the compiler failed, on a machine that cannot compile or run it.

    Needs Linux, AVX-512 and g++: with another compiler it would bring threads of its own beside torch's. The result is kept in `$XDG_CACHE_HOME/koine`
    (`~/.cache/koine`) under a name that says source, compiler and processor.
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
        return ctypes.CDLL(str(_built(gxx, source, _folder() / name)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{gxx} did not compile {source.name} ({reason.strip().splitlines()[-1]}); going on with torch's products, slower for few tokens",
            KoineWarning,
            stacklevel=2,
        )
        return None


def _folder() -> Path:
    """Where compiled code is kept; a folder of this process alone where the user's cannot be written."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "koine"
    try:
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(kept, os.W_OK):
            return kept
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="koine-"))


def _built(gxx: str, source: Path, target: Path) -> Path:
    """Compiles to a file beside the target, which appears whole or not at all: several processes may do so at once."""
    if not target.is_file():
        descriptor, partial = tempfile.mkstemp(suffix=".so", dir=target.parent)
        os.close(descriptor)
        try:
            subprocess.run(
                [gxx, *FLAGS, "-o", partial, str(source)], check=True, capture_output=True, text=True
            )
            os.replace(partial, target)  # noqa: PTH105
        finally:
            Path(partial).unlink(missing_ok=True)
    return target
