"""`koine evaluate --suite long`: its options, and the run of the long-context suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from koine.cli.evaluate.output import Outcome, print_table_block
from koine.errors import UserError
from koine.hub import model_name
from koine.terminal import plain_console

OPTIONS = (
    click.option(
        "--lengths",
        help="Tokens of a prompt, with commas between.  [default: 512,2048 as far as MODEL allows]",
    ),
    click.option("--depths", help="Places of the needles, in per cent.  [default: 0,25,50,75,100]"),
    click.option("--tasks", help="Only these, with commas between.  [default: all that fit]"),
    click.option("--samples", type=int, help="Prompts of a task at each length and depth.  [default: 4]"),
    click.option(
        "--haystack",
        multiple=True,
        type=click.Path(),
        help="Text to hide the needles in (file or folder); may be repeated.  [default: the sample world]",
    ),
    click.option(
        "--qa",
        type=click.Path(),
        help="Records with context, question and answers.  [default: the sample world's questions]",
    ),
    click.option("--chat", is_flag=True, help="Put prompts into the chat template.  [default: plain text]"),
)


def evaluate_suite(
    model: Path,
    *,
    language: str | None,
    device: str,
    dtype: str,
    seed: int,
    lengths: str | None,
    depths: str | None,
    tasks: str | None,
    samples: int | None,
    haystack: tuple[str, ...],
    qa: str | None,
    chat: bool,
) -> Outcome:
    """Run the suite, with a progress bar."""
    from koine.evaluate.long_context import LongContextOptions, evaluate_long_context
    from koine.evaluate.long_context.report import facts, sections

    given: dict[str, Any] = {
        "lengths": None if lengths is None else numbers(lengths, "--lengths", int),
        "depths": None if depths is None else numbers(depths, "--depths", float),
        "tasks": None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()],
        "samples": samples,
        "language": language,
        "questions": qa,
    }
    options = LongContextOptions(
        haystack=haystack,
        chat=chat,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},
    )
    result = _with_progress(
        lambda progress: evaluate_long_context(model, options, device=device, dtype=dtype, progress=progress)
    )
    return Outcome(
        title=f"Long context: {model_name(model)}",
        result=result,
        sections=sections(result),
        facts=facts(result),
    )


def numbers(text: str, option: str, convert: Callable[[str], Any]) -> list[Any]:
    """Parse a list of numbers with commas between; raises `UserError` naming the option."""
    found = []
    for part in text.split(","):
        try:
            found.append(convert(part.strip().removesuffix("%")))
        except ValueError:
            raise UserError(
                f"'{part.strip()}' is no number", where=option, hint="give numbers with commas between"
            ) from None
    return found


def _with_progress(run: Callable[[Callable[[int, int, str], None]], dict[str, Any]]) -> dict[str, Any]:
    from rich.progress import Progress

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("")

        def progress(done: int, total: int, current: str) -> None:
            bars.update(bar, completed=done, total=total, description=current)

        return run(progress)


def print_tables(outcome: Outcome) -> None:
    """Print tasks, grids, loss by length and attention as tables, and what was left out."""
    from koine.evaluate.long_context.report import TASK_COLUMNS, attention_rows, task_rows

    result = outcome.result
    if result["tasks"]:
        _print("Long-context tasks", list(TASK_COLUMNS), task_rows(result))
    for task, grid in result["grid"].items():
        rows = [
            [f"{depth:g} %", *("" if value is None else f"{value:.0%}" for value in values)]
            for depth, values in zip(grid["depths"], grid["score"], strict=True)
        ]
        _print(task, ["depth", *(f"{length:,}" for length in grid["lengths"])], rows)
    if "positions" in result:
        rows = [
            [
                f"{int(length):,}",
                f"{one['nats_per_token']:.4f}",
                "" if one["bits_per_byte"] is None else f"{one['bits_per_byte']:.4f}",
            ]
            for length, one in result["positions"]["lengths"].items()
        ]
        _print("Loss over the first tokens", ["tokens", "nats/token", "bits/byte"], rows)
    if result.get("attention"):
        segments = next(iter(result["attention"].values()))["overall"]["mass"]
        columns = ["length", "layers", *segments, "bits, rows", "bits, mean row"]
        _print("Attention of question and answer", columns, attention_rows(result))
    for left in result["left_out"]:
        length = "" if left["length"] is None else f" at {left['length']:,} tokens"
        click.echo(f"left out: {left['task']}{length} ({left['why']})")


def _print(title: str, columns: list[str], rows: list[list[str]]) -> None:
    print_table_block({"title": title, "columns": columns, "rows": rows}, left=("task", "layers"))
