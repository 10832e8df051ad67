"""Print tables: plain and complete through a pipe, folded and never cut off in a narrow terminal."""

from __future__ import annotations

from typing import Any

from koine.terminal import plain_console


def print_table(table: Any) -> None:
    """Print a table of rich. Through a pipe it has no lines, and each row is one line, however long."""
    console = plain_console()
    if console.is_terminal:
        for column in table.columns:
            column.overflow = "fold"
    else:
        table.box = None
        needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
        console = plain_console(width=max(console.width, needed))
    console.print(table)
