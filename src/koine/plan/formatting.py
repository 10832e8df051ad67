"""Format times, sizes and tables for people."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

WIDEST_TEXT = 100


def duration(seconds: float) -> str:
    """Return seconds as text: `0.4 s`, `2 min 05 s`, `1 h 02 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Return bytes as text: `512 KiB`, `312 MiB`, `1.2 GiB`."""
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1000:
            return f"{count:.0f} {unit}"
    return f"{count / 1024:.1f} GiB"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table with left-aligned columns; the first row is the heading."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def text_width() -> int:
    """Return the columns for running text: the terminal's, at most 100."""
    return min(WIDEST_TEXT, shutil.get_terminal_size((WIDEST_TEXT, 24)).columns)


def hanging(first: str, text: str) -> list[str]:
    """Return `text` wrapped to the terminal's width, indented by `first`, which begins the first line."""
    width = max(text_width(), len(first) + 30)
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]


def time_left(seconds: float) -> str:
    """Return seconds as a rough text: `about 40 seconds left`, `about 4 minutes left`."""
    if seconds < 10:
        return "a few seconds left"
    if seconds < 55:
        return f"about {round(seconds / 10) * 10} seconds left"
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"about {minutes} minute{'' if minutes == 1 else 's'} left"
    hours, minutes = divmod(round(minutes / 10) * 10, 60)
    return f"about {hours} h {minutes:02d} min left"
