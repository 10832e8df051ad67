"""`koine align inspect`: what is in groups, before training on them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import DEVICE, MODEL, SOURCE
from koine.cli.commands import Command
from koine.cli.outputs import OVERWRITE, OutputFile, output_files, say_written
from koine.errors import UserError
from koine.terminal import note

if TYPE_CHECKING:
    from koine.align.inspect_pairs import Inspection


@click.command(cls=Command)
@click.argument("pairs", type=SOURCE)
@click.option("--model", type=MODEL, required=True, help="Model folder, or OWNER/NAME of the hub, to train.")
@click.option(
    "--held-out", type=SOURCE, help="Groups of another split, which must not have the same prompts."
)
@click.option(
    "--kind",
    type=click.Choice(["preferences", "labelled", "scored"]),
    default="preferences",
    show_default=True,
    help="Kind of groups to make of records; token shards say theirs.",
)
@click.option(
    "--sequence-length",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of a row of the training.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    help="Pairs that the model reads, evenly spread; 0: none.  [default: all]",
)
@click.option(
    "--show",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Pairs to show with the most CHES.",
)
@click.option(
    "--identify-languages/--no-identify-languages",
    "identify_languages",
    default=True,
    show_default=True,
    help="Compare the languages of prompts and answers (extra langid).",
)
@DEVICE
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of the model.",
)
@click.option("--out", type=OutputFile(), help="HTML file to write with the tables.")
@OVERWRITE
def inspect(
    pairs: str,
    model: Path,
    held_out: str | None,
    kind: Any,
    sequence_length: int,
    limit: int | None,
    show: int,
    identify_languages: bool,
    device: str,
    dtype: str,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Inspect PAIRS (token shards of groups, or records) before MODEL is trained on them.

    Counts by language: repeated and contradicted groups, prompts in another split, truncation, answers in
    another language than the prompt, how often the longer answer is the better one, and how often MODEL
    prefers it already. CHES is highest for pairs that are likely to lower the chosen answer's likelihood.
    """
    from koine.align.inspect_pairs import check_tokenizer, inspect_groups, opened_groups
    from koine.hardware import check_device
    from koine.tokenizer import load_tokenizer

    if not model.is_dir():
        raise UserError("no such model directory", where=model, hint="give a folder that holds config.json")
    if device != "auto":
        check_device(device)
    tokenizer = load_tokenizer(model)
    with ExitStack() as stack:
        targets = stack.enter_context(
            output_files({"--out": out}, overwrite=overwrite, reads=[model, pairs, held_out])
        )
        source = stack.enter_context(opened_groups(pairs, model, kind=kind))
        other = None if held_out is None else stack.enter_context(opened_groups(held_out, model, kind=kind))
        for one in (source, other):
            if one is not None:
                check_tokenizer(one, tokenizer, model)
        reads = source.kind == "preferences" and limit != 0
        loaded, place = _open(model, device, dtype) if reads else (None, "cpu")
        if reads:
            count = len(source) if limit is None else min(limit, len(source))
            note(f"reading {count:,} pairs with {model}", err=True)
        inspection = inspect_groups(
            source,
            tokenizer,
            model=loaded,
            held_out=other,
            sequence_length=sequence_length,
            limit=limit,
            shown=show,
            identify_languages=identify_languages,
            device=place,
        )
        if (target := targets["--out"]) is not None:
            _write_page(target, inspection, pairs, model)
    print_answer(inspection.to_json(), lambda: _show(inspection))
    say_written(out)


def _open(model: Path, device: str, dtype: str) -> tuple[Any, str]:
    """Return the model, moved and cast, and its device."""
    import torch

    from koine.cli.training_run import open_model
    from koine.hardware import chosen_device, chosen_dtype

    place = chosen_device(device)
    opened: Any = open_model(model)
    return opened.to(place, getattr(torch, chosen_dtype(dtype))).eval(), place


def _write_page(target: Path, inspection: Inspection, pairs: str, model: Path) -> None:
    from koine.align.inspect_report import report_blocks
    from koine.plan.report.page import write_page

    facts = [
        ("Groups", f"{inspection.total.groups:,} ({inspection.kind})"),
        ("Data", pairs),
        ("Model", str(model)),
        ("Tokens of a row", f"{inspection.sequence_length:,}"),
    ]
    write_page(
        target,
        name="Inspection of preference data",
        sections=[("Inspection", report_blocks(inspection))],
        facts=facts,
    )


def _show(inspection: Inspection) -> None:
    from rich.table import Table

    from koine.align.inspect_report import displacing_rows, table
    from koine.cli.tables import print_table

    for title, (columns, rows) in (
        (None, table(inspection)),
        ("likeliest to lower the chosen answer's likelihood:", displacing_rows(inspection)),
    ):
        if not rows:
            continue
        if title is not None:
            click.echo(f"\n{title}")
        shown = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
        for number, column in enumerate(columns):
            shown.add_column(column, justify="right" if title is None and number else "left")
        for row in rows:
            shown.add_row(*row)
        print_table(shown)
