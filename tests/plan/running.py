"""Start `koine` as a user does, in a folder with a file of plans."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `koine` in `place`."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "koine", *arguments],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def koine(place: Path, *arguments: str) -> tuple[int, str, str]:
    """Run `koine` to its end: exit code, standard output, standard error."""
    process = start(place, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.02)
