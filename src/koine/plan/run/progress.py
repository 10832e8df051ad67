"""Progress of a step, told to the process that runs the plan; silent outside a plan."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from koine.files import parse_json

VARIABLE = "KOINE_PROGRESS"
EVERY_SECONDS = 0.1
_last = 0.0


def report(fraction: float, text: str = "") -> None:
    """Say that `fraction` (0 to 1) of the running step is done; cheap enough to be called at every iteration."""
    global _last
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    now = time.monotonic()
    if (place := os.environ.get(VARIABLE)) and (fraction == 1.0 or now - _last >= EVERY_SECONDS):
        _last = now
        write(Path(place), fraction=fraction, text=text)


def write(path: Path, **fields: Any) -> None:
    """Replace what is told in `path`; where that cannot be written, nothing is told and the step goes on."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        temporary.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read the last progress; empty where none was written or something else lies there."""
    try:
        told = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(told) if isinstance(told, dict) and all(map(_sound, told.items())) else {}


def _sound(entry: tuple[str, Any]) -> bool:
    """Return whether a field is of the kind that `write` is given."""
    name, value = entry
    if name == "fraction":
        return isinstance(value, int | float) and 0.0 <= value <= 1.0
    return name == "waiting" or isinstance(value, str)
