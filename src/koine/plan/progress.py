"""Progress of a step, told to the process that runs the plan; silent outside a plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "KOINE_PROGRESS"


def report(fraction: float, text: str = "") -> None:
    """Say that `fraction` (0 to 1) of the running step is done."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    if place := os.environ.get(VARIABLE):
        path = Path(place)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps({"fraction": fraction, "text": text}), encoding="utf-8")
        temporary.replace(path)
