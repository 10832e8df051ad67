"""What a merge has done, line by line: a file that only grows, and may end anywhere when the process or the machine does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from koine.files import parse_json


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines; what comes after the last of them is cut off, so that the next line does not run into it."""
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
