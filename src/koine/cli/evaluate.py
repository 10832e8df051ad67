"""`koine evaluate`: bits per byte and question accuracy, as a table and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, type=click.Path(), help="Documents (file or folder); may be repeated.")
@click.option(
    "--questions", multiple=True, type=click.Path(), help="Questions with answers; may be repeated."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results as JSON to this file.")
@click.option(
    "--batch-size", default=16, show_default=True, help="Documents at a time; results do not depend on it."
)
@click.option(
    "--max-length",
    type=int,
    help="Tokens that the model sees at once; longer documents are scored in overlapping windows.  "
    "[default: as the model's configuration says]",
)
@click.option("--limit", type=int, help="At most this many records of each language.  [default: all]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the bootstrap intervals.")
def evaluate(
    model: Path,
    data: tuple[str, ...],
    questions: tuple[str, ...],
    out: Path | None,
    batch_size: int,
    max_length: int | None,
    limit: int | None,
    device: str,
    dtype: str,
    seed: int,
) -> None:
    """Measure MODEL: bits per byte per language and domain, and the accuracy of its answers.

    Every document is scored alone from its beginning, all its bytes counted; intervals are 95 % bootstrap intervals over
    documents and questions.
    """
    from koine.evaluate import evaluate_model

    if out is not None and not out.parent.is_dir():
        from koine.errors import UserError

        raise UserError("no such folder", where=out.parent, mend="make it first, or choose another --out")
    result = evaluate_model(
        model,
        data=data,
        questions=questions,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    if out is not None:
        from koine.files import write_json

        write_json(out, result)
    show(result)
    if out is not None:
        click.echo(f"written to {out}")


def show(result: dict[str, Any]) -> None:
    """Print the results as tables."""
    from rich.console import Console

    console = Console()
    if "overall" in result:
        console.print(_bits_table(result))
    if "questions" in result:
        console.print(_question_table(result["questions"]))


def _bits_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Bits per byte (lower is better)")
    for name in ("", "bits/byte", "95 % interval", "bytes", "documents", "bytes/token"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("all", result["overall"])]
    rows += list(result["languages"].items())
    domains = [(f"domain {name}", entry) for name, entry in result["domains"].items()]
    for index, (name, entry) in enumerate(rows + domains):
        if index in (1, len(rows)):
            table.add_section()
        measured = entry["bits_per_byte"]
        table.add_row(
            name,
            f"{measured['value']:.4f}",
            _interval(measured["interval"], 4),
            f"{measured['bytes']:,}",
            f"{measured['documents']:,}",
            f"{measured['bytes'] / max(measured['tokens'], 1):.2f}",
        )
    return table


def _question_table(questions: dict[str, Any]) -> Any:
    from rich.table import Table

    kinds = list(questions["overall"])
    table = Table(title="Exact answers (greedy)")
    table.add_column("")
    for kind in kinds:
        table.add_column(kind, justify="right")
        table.add_column("95 % interval", justify="right")
        table.add_column("questions", justify="right")
    for index, (name, entry) in enumerate([("all", questions["overall"]), *questions["languages"].items()]):
        if index == 1:
            table.add_section()
        cells = []
        for kind in kinds:
            measured = entry.get(kind)
            cells += (
                [
                    f"{measured['value']:.1%}",
                    _interval(measured["interval"], 3),
                    f"{measured['questions']:,}",
                ]
                if measured
                else ["", "", ""]
            )
        table.add_row(name, *cells)
    return table


def _interval(interval: list[float] | None, digits: int) -> str:
    return "–" if interval is None else f"{interval[0]:.{digits}f} – {interval[1]:.{digits}f}"
