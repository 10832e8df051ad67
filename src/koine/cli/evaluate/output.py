"""Output of an evaluation: JSON, a page with plots, and tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Block = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """The results of an evaluation, and their report.

    result: as JSON. sections: titled report blocks of a page. facts: name and value of each line in its head.
    """

    title: str
    result: dict[str, Any]
    sections: list[tuple[str, list[Block]]]
    facts: list[tuple[str, str]]


def write_outcome(outcome: Outcome, *, out: Path | None, page: Path | None) -> None:
    """Write the results as JSON to `out` and as an HTML page to `page`, where they are given."""
    if out is not None:
        from koine.files import write_json

        write_json(out, outcome.result)
    if page is not None:
        from koine.plan.report.page import write_page

        write_page(page, name=outcome.title, sections=outcome.sections, facts=outcome.facts)


def print_table_block(block: Mapping[str, Any], left: Sequence[str] = ("",)) -> None:
    """Print a report block of kind `table`; the columns named in `left` are aligned on the left."""
    from rich.table import Table

    from koine.cli.tables import print_table

    table = Table(title=block["title"])
    for name in block["columns"]:
        table.add_column(name, justify="left" if name in left else "right")
    for row in block["rows"]:
        table.add_row(*row)
    print_table(table)
