"""Report the progress of a step to the process that runs the plan; nothing happens outside a plan."""

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
    """Report that `fraction` (0 to 1) of the running step is done; cheap enough for every iteration."""
    global _last
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    now = time.monotonic()
    if (place := os.environ.get(VARIABLE)) and (fraction == 1.0 or now - _last >= EVERY_SECONDS):
        _last = now
        write_progress(Path(place), fraction=fraction, text=text)


def write_progress(path: Path, **fields: Any) -> None:
    """Write the latest progress to `path`; if that fails, the step goes on without."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(fields), encoding="utf-8")
        temporary.replace(path)


def read_progress(path: Path) -> dict[str, Any]:
    """Return the last progress; empty where none was written or the file is something else."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) and all(map(_is_valid, found.items())) else {}


def _is_valid(entry: tuple[str, Any]) -> bool:
    """Return whether a field has the type that `write_progress` writes."""
    name, value = entry
    if name == "fraction":
        return isinstance(value, int | float) and 0.0 <= value <= 1.0
    return name == "waiting" or isinstance(value, str)
