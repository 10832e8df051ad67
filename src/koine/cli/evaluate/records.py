"""`koine evaluate` on documents and questions: its options, and the run of the table of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.arguments import FORMAT
from koine.cli.evaluate.output import Outcome, print_table_block

OPTIONS = (
    click.option(
        "--data",
        multiple=True,
        metavar="SOURCE",
        help="Documents: a file, a folder, or a data set of the hub (OWNER/NAME); may be repeated.  "
        "[required without --questions and --suite]",
    ),
    click.option(
        "--questions",
        multiple=True,
        metavar="SOURCE",
        help="Questions with answers, likewise; may be repeated.  [required without --data and --suite]",
    ),
    click.option(
        "--training-questions",
        multiple=True,
        metavar="SOURCE",
        help="Questions that the model was trained on, for the majority baseline: the most frequent answer to "
        "each kind of question is taken from them; may be repeated.  [default: from --questions]",
    ),
    click.option(
        "--batch-size",
        default=16,
        show_default=True,
        help="Documents at a time; results do not depend on it.",
    ),
    click.option(
        "--max-length",
        type=int,
        help="Tokens of a window; longer documents are scored in overlapping windows.  "
        "[default: as the model's configuration says]",
    ),
    click.option("--limit", type=int, help="At most this many records of each language.  [default: all]"),
    click.option(
        "--split",
        help="Split of a folder to read, as its file names say; all: every file.  "
        "[default: all; a folder of several splits is refused]",
    ),
    click.option(
        "--field", "fields", multiple=True, metavar="NAME=COLUMN", help="Our field's name in the data."
    ),
    FORMAT,
    click.option(
        "--max-bad",
        type=float,
        default=0.01,
        show_default=True,
        help="Share of bad records above which to stop.",
    ),
    click.option(
        "--txt",
        "unit",
        type=click.Choice(["paragraph", "line", "file"]),
        default="paragraph",
        show_default=True,
        help="What a document is in a .txt file.",
    ),
)


def evaluate_records(
    model: Path,
    *,
    language: str | None,
    device: str,
    dtype: str,
    seed: int,
    data: tuple[str, ...],
    questions: tuple[str, ...],
    training_questions: tuple[str, ...],
    batch_size: int,
    max_length: int | None,
    limit: int | None,
    split: str | None,
    fields: tuple[str, ...],
    record_format: str | None,
    max_bad: float,
    unit: Any,
) -> Outcome:
    """Evaluate a model on documents and questions."""
    from koine.cli.data import field_mapping
    from koine.data import RecordFormat
    from koine.evaluate import evaluate_model
    from koine.evaluate.records import RecordOptions
    from koine.hub import model_name

    result = evaluate_model(
        model,
        data=data,
        questions=questions,
        training_questions=training_questions,
        batch_size=batch_size,
        max_length=max_length,
        limit=limit,
        device=device,
        dtype=dtype,
        seed=seed,
        record_options=RecordOptions(
            split=split,
            fields=field_mapping(fields),
            language=language,
            max_bad_share=max_bad,
            unit=unit,
            record_format=RecordFormat(record_format),
        ),
    )
    from koine.evaluate.table import report_sections

    given = {"Documents": ", ".join(data), "Questions": ", ".join(questions), "Seed": str(seed)}
    return Outcome(
        title=f"Evaluation: {model_name(model)}",
        result=result,
        sections=report_sections(result),
        facts=[(name, value) for name, value in given.items() if value],
    )


def print_tables(outcome: Outcome) -> None:
    """Print the tables of every evaluation."""
    for _, blocks in outcome.sections:
        for block in blocks:
            if block["kind"] == "table":
                print_table_block(block, left=("", "kind"))
