"""`koine evaluate --suite long`: what it was asked, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from koine.errors import UserError
from koine.terminal import plain_console


def numbers(text: str, option: str, convert: Callable[[str], Any]) -> list[Any]:
    """The numbers of a list with commas; raises `UserError` naming the option."""
    found = []
    for part in text.split(","):
        try:
            found.append(convert(part.strip().removesuffix("%")))
        except ValueError:
            raise UserError(
                f"'{part.strip()}' is no number", where=option, hint="give numbers with commas between"
            ) from None
    return found


def run_long(model: Path, *, out: Path | None, page: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Run the suite with a bar of progress and write the files; returns the results."""
    from koine.evaluate.long_context import evaluate_long_context
    from koine.files import write_json

    result = _with_progress(lambda say: evaluate_long_context(model, say=say, **options))
    if out is not None:
        write_json(out, result)
    if page is not None:
        from koine.evaluate.long_context.report import facts, sections
        from koine.plan.report.page import write_page

        write_page(
            page,
            name=f"Long context: {model.resolve().name}",
            sections=sections(result),
            facts=facts(result),
        )
    return result


def _with_progress(run: Callable[[Callable[[int, int, str], None]], dict[str, Any]]) -> dict[str, Any]:
    from rich.progress import Progress

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("")

        def say(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=what)

        return run(say)


def show(result: dict[str, Any]) -> None:
    """Print the results as tables."""
    from koine.cli.tables import print_table
    from koine.evaluate.long_context.report import TABLE, attention_rows, task_rows

    if result["tasks"]:
        print_table(_table("Long-context tasks", list(TABLE), task_rows(result), left=("task",)))
    for task, grid in result["grid"].items():
        rows = [
            [f"{depth:g} %", *("" if value is None else f"{value:.0%}" for value in values)]
            for depth, values in zip(grid["depths"], grid["score"], strict=True)
        ]
        columns = ["depth", *(f"{length:,}" for length in grid["lengths"])]
        print_table(_table(task, columns, rows))
    if "positions" in result:
        lengths = result["positions"]["lengths"]
        rows = [
            [
                f"{int(length):,}",
                f"{one['nats_per_token']:.4f}",
                "" if one["bits_per_byte"] is None else f"{one['bits_per_byte']:.4f}",
            ]
            for length, one in lengths.items()
        ]
        print_table(_table("Loss over the first tokens", ["tokens", "nats/token", "bits/byte"], rows))
    if result.get("attention"):
        segments = next(iter(result["attention"].values()))["overall"]["mass"]
        columns = ["length", "layers", *segments, "bits, rows", "bits, mean row"]
        print_table(
            _table("Attention of question and answer", columns, attention_rows(result), left=("layers",))
        )
    for left in result["left_out"]:
        length = "" if left["length"] is None else f" at {left['length']:,} tokens"
        click.echo(f"left out: {left['task']}{length} ({left['why']})")


def _table(title: str, columns: list[str], rows: list[list[str]], left: tuple[str, ...] = ()) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        table.add_row(*row)
    return table
