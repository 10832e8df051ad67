"""`koine evaluate`: bits per byte, question accuracy and long contexts, as tables and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.outputs import OVERWRITE, output_files


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    multiple=True,
    metavar="SOURCE",
    help="Documents: a file, a folder, a Hugging Face data set or hub:OWNER/NAME; may be repeated.",
)
@click.option(
    "--questions",
    multiple=True,
    metavar="SOURCE",
    help="Questions with answers, likewise; may be repeated.",
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
@click.option(
    "--split",
    help="Which files of a folder to read, where their names say a split; all: every one.  "
    "[default: all; a folder of several splits is refused]",
)
@click.option("--field", "fields", multiple=True, metavar="NAME=COLUMN", help="Our field's name in the data.")
@click.option(
    "--max-bad",
    type=float,
    default=0.01,
    show_default=True,
    help="Share of bad records above which to stop.",
)
@click.option(
    "--txt",
    "unit",
    type=click.Choice(["paragraph", "line", "file"]),
    default="paragraph",
    show_default=True,
    help="What a document is in a .txt file.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Precision.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the intervals and of the suite's prompts.",
)
@click.option(
    "--suite",
    type=click.Choice(["long"]),
    help="long: needles, RULER-class tasks, loss per position, attention; the options below belong to it.",
)
@click.option(
    "--lengths", help="Tokens of a prompt, with commas between.  [default: 512,2048 as far as MODEL allows]"
)
@click.option("--depths", help="Where the needles stand, in per cent.  [default: 0,25,50,75,100]")
@click.option("--tasks", help="Only these, with commas between.  [default: all that fit]")
@click.option("--samples", type=int, help="Prompts of a task at each length and depth.  [default: 4]")
@click.option(
    "--haystack",
    multiple=True,
    type=click.Path(),
    help="Text to hide the needles in (file or folder); may be repeated.  [default: the sample world]",
)
@click.option(
    "--language",
    help="Language of records that do not say; with --suite long, of haystack and needles.  [default: the haystack's, or en]",
)
@click.option(
    "--qa",
    type=click.Path(),
    help="Records with context, question and answers.  [default: the sample world's questions]",
)
@click.option("--chat", is_flag=True, help="Ask in the chat template.  [default: as a plain text]")
@click.option("--page", type=click.Path(path_type=Path), help="Write a page with plots to this HTML file.")
@OVERWRITE
def evaluate(
    model: Path,
    data: tuple[str, ...],
    questions: tuple[str, ...],
    out: Path | None,
    batch_size: int,
    max_length: int | None,
    limit: int | None,
    split: str | None,
    fields: tuple[str, ...],
    max_bad: float,
    unit: Any,
    device: str,
    dtype: str,
    seed: int,
    suite: str | None,
    lengths: str | None,
    depths: str | None,
    tasks: str | None,
    samples: int | None,
    haystack: tuple[str, ...],
    language: str | None,
    qa: str | None,
    chat: bool,
    page: Path | None,
    overwrite: bool,
) -> None:
    """Measure MODEL: bits per byte per language and domain, and the accuracy of its answers; with --suite long, what it makes of long texts.

    A mixture of experts also says where it sends the tokens of each domain.
    Every document is scored alone from its beginning, all its bytes counted; intervals are 95 % bootstrap intervals over
    documents and questions.
    """
    from koine.errors import UserError

    of_suite = {
        "--lengths": lengths,
        "--depths": depths,
        "--tasks": tasks,
        "--samples": samples,
        "--haystack": haystack,
        "--qa": qa,
        "--chat": chat,
        "--page": page,
    }
    of_others = {
        "--data": data,
        "--questions": questions,
        "--max-length": max_length,
        "--limit": limit,
        "--split": split,
        "--field": fields,
    }
    for option, value in (of_others if suite else of_suite).items():
        if value:
            raise UserError(
                f"{option} is not an option of {'the suite long' if suite else 'an evaluation without --suite long'}",
                hint=f"leave it out, or {'leave --suite out' if suite else 'add --suite long'}",
            )
    outputs = {"--out": out, "--page": page}
    reads = [model, *data, *questions, *haystack, qa]
    if suite is not None:
        from koine.cli.evaluate.long_context import numbers, run_long
        from koine.cli.evaluate.long_context import show as show_long

        options: dict[str, Any] = {
            "haystack": haystack,
            "language": language,
            "questions": qa,
            "chat": chat,
            "seed": seed,
            "device": device,
            "dtype": dtype,
        }
        if lengths is not None:
            options["lengths"] = numbers(lengths, "--lengths", int)
        if depths is not None:
            options["depths"] = numbers(depths, "--depths", float)
        if tasks is not None:
            options["tasks"] = [task.strip() for task in tasks.split(",") if task.strip()]
        if samples is not None:
            options["samples"] = samples
        with output_files(outputs, overwrite=overwrite, reads=reads) as targets:
            result = run_long(model, out=targets["--out"], page=targets["--page"], options=options)
        show_long(result)
        for target in (out, page):
            if target is not None:
                click.echo(f"written to {target}")
        return
    from koine.cli.data import field_mapping
    from koine.evaluate import evaluate_model
    from koine.evaluate.records import ReadOptions
    from koine.files import write_json

    reading = ReadOptions(
        split=split, fields=field_mapping(fields), language=language, max_bad_share=max_bad, unit=unit
    )
    with output_files(outputs, overwrite=overwrite, reads=reads) as targets:
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
            reading=reading,
        )
        if (target := targets["--out"]) is not None:
            write_json(target, result)
    show(result)
    if out is not None:
        click.echo(f"written to {out}")


def show(result: dict[str, Any]) -> None:
    """Print the results as tables."""
    from koine.cli.tables import print_table

    if "overall" in result:
        print_table(_bits_table(result))
    if "routing" in result:
        print_table(_routing_table(result["routing"]))
    if "questions" in result:
        print_table(_question_table(result["questions"]))


def _bits_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Bits per byte (lower is better)")
    for name in ("", "bits/byte", "95 % interval", "bytes", "texts", "bytes/token"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [("all", result["overall"])]
    rows += list(result["languages"].items())
    domains = [(f"domain {name}", entry) for name, entry in result["domains"].items()]
    for index, (name, entry) in enumerate(rows + domains):
        if index in (1, len(rows)):
            table.add_section()
        table.add_row(
            name,
            f"{entry['bits_per_byte']:.4f}",
            _interval(entry["interval"], 4),
            f"{entry['bytes']:,}",
            f"{entry['documents']:,}",
            f"{entry['bytes'] / max(entry['tokens'], 1):.2f}",
        )
    return table


def _routing_table(routing: dict[str, Any]) -> Any:
    from rich.table import Table

    experts = list(next(iter(routing.values()))["chosen"])
    table = Table(title="Share of tokens that goes to each expert (router's probability)")
    table.add_column("")
    for expert in experts:
        table.add_column(expert, justify="right")
    for name, entry in routing.items():
        table.add_row(
            name, *(f"{entry['chosen'][one]:.1%} ({entry['probability'][one]:.2f})" for one in experts)
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
        table.add_column("asked", justify="right")
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
