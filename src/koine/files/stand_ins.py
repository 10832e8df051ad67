"""Temporary folders that stand for something else: records and messages then name what they stand for.

A base merged with an adapter for one command lies in a folder that is gone when the command ends.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

_SOURCES: dict[str, tuple[Path, ...]] = {}


def register_stand_in(folder: Path, sources: Sequence[Path]) -> None:
    """Remember what a temporary folder is made from, in this process."""
    _SOURCES[os.path.realpath(folder)] = tuple(sources)


def sources_of(path: str | Path) -> tuple[Path, ...] | None:
    """Return what a temporary folder stands for; None for any other path."""
    return _SOURCES.get(os.path.realpath(path)) if _SOURCES else None
