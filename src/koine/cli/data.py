"""`koine data`: the sample world, contents of a source, token shards, and documents of a training step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import FORMAT, LANGUAGE, LANGUAGES, SOURCE, TOKENIZER
from koine.cli.groups import HelpGroup
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.errors import KoineWarning, UserError
from koine.terminal import note, printable

if TYPE_CHECKING:
    from koine.data.records import RecordReader


@click.group(cls=HelpGroup)
def data() -> None:
    """Write the sample world, tokenize text, look up a training step's documents."""


def reading_options(command: Any) -> Any:
    """Add the options of every command that reads records."""
    for option in reversed(
        [
            click.option(
                "--field",
                "fields",
                multiple=True,
                metavar="NAME=COLUMN",
                help="Column of one of our fields; repeatable.",
            ),
            FORMAT,
            click.option(
                "--take",
                type=click.Choice(["chosen", "rejected"]),
                default="chosen",
                show_default=True,
                help="Answers of preference records to read.",
            ),
            click.option("--language", type=LANGUAGE, help="Language of records without one."),
            click.option("--domain", help="Domain of records without one.  [default: text]"),
            click.option(
                "--max-bad",
                type=float,
                default=0.01,
                show_default=True,
                help="Stop if a larger share of the records is bad.",
            ),
            click.option(
                "--split",
                default="train",
                show_default=True,
                help="Files of a folder to read, if their names name a split; all: every file.",
            ),
            click.option(
                "--txt",
                "unit",
                type=click.Choice(["paragraph", "line", "file"]),
                default="paragraph",
                show_default=True,
                help="Unit of a .txt file that becomes a document.",
            ),
        ]
    ):
        command = option(command)
    return command


def field_mapping(fields: tuple[str, ...]) -> dict[str, str]:
    """Parse `NAME=COLUMN` options. Raises `UserError` for one without `=`."""
    mapping = {}
    for field in fields:
        name, separator, column = field.partition("=")
        if not (name and separator and column):
            raise UserError(f"--field '{field}' is not NAME=COLUMN", hint="for example --field text=content")
        mapping[name] = column
    return mapping


@data.command()
@click.option(
    "--languages", type=LANGUAGES, help="Codes, separated by commas.  [default: the 24 with questions]"
)
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write.")
@OVERWRITE
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed.")
@click.option(
    "--documents-per-language",
    "documents",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Documents of each language.",
)
@click.option(
    "--questions-per-language",
    "questions",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Questions of each language.",
)
@click.option(
    "--code-bytes", type=click.IntRange(min=0), default=300_000, show_default=True, help="Bytes of code."
)
@click.option(
    "--preferences-per-language",
    "preferences",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Pairs of answers of each language, for `koine align`.",
)
@click.option(
    "--flipped",
    type=click.FloatRange(min=0, max=0.5),
    default=0.25,
    show_default=True,
    help="Share of the pairs with the wrong label.",
)
def sample(
    languages: str | None,
    out: Path,
    overwrite: bool,
    seed: int,
    documents: int,
    questions: int,
    code_bytes: int,
    preferences: int,
    flipped: float,
) -> None:
    """Write the sample world: documents, questions with exact answers, code, and preferences.

    The table counts training texts, held-out texts, training chats, and test questions: on facts of the
    training text (recall), on other facts, and on other territories.
    """
    from koine.data.sample import QUESTION_LANGUAGES, write_sample
    from koine.languages import language, parse_languages

    codes = tuple(QUESTION_LANGUAGES) if languages is None else parse_languages(languages)
    with recorded_output(out, {}):
        summary = write_sample(
            codes,
            out,
            seed=seed,
            documents_per_language=documents,
            questions_per_language=questions,
            code_bytes=code_bytes,
            preferences_per_language=preferences,
            flipped=flipped,
            overwrite=overwrite,
        )
    # Shorter headings than the report's, so that ten columns fit into 80 characters.
    short = [
        "language",
        "name",
        "texts",
        "bytes",
        "held_out",
        "its_bytes",
        "chats",
        "recall",
        "new_facts",
        "new_places",
    ]
    rows = [list(row) for row in summary.rows()]
    counted = [
        {"language": code, "name": language(code).name, **counts}
        for code, counts in summary.languages.items()
    ]
    print_answer(
        {"languages": counted, "code": summary.code, "written": out},
        lambda: _table([heading.replace("_", " ") for heading in short], rows),
    )
    note(f"written to {out}")


@data.command()
@click.argument("source", type=SOURCE)
@click.option(
    "--tokenizer", type=TOKENIZER, required=True, help="A tokenizer or model directory, or OWNER/NAME."
)
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write.")
@OVERWRITE
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Number of processes."
)
@click.option(
    "--kind",
    type=click.Choice(["documents", "preferences", "labelled", "scored"]),
    default="documents",
    show_default=True,
    help="What a record is: a document, or completions of one prompt (for `koine align`).",
)
@click.option("--revision", help="Turn that asks to improve an answer, for --kind preferences (SRPO).")
@reading_options
def tokenize(
    source: str,
    tokenizer: Path,
    out: Path,
    overwrite: bool,
    workers: int,
    kind: Any,
    revision: str | None,
    fields: tuple[str, ...],
    record_format: str | None,
    take: Any,
    language: str | None,
    domain: str | None,
    max_bad: float,
    split: str,
    unit: Any,
) -> None:
    """Turn SOURCE (a file, a folder, or OWNER/NAME of the hub) into token shards."""
    from koine.data import RecordFormat, TokenSource
    from koine.data import tokenize as write

    with recorded_output(out, {"source": source, "tokenizer": tokenizer}):
        reader = write(
            source,
            tokenizer,
            out=out,
            overwrite=overwrite,
            workers=workers,
            fields=field_mapping(fields),
            language=language,
            domain=domain,
            max_bad_share=max_bad,
            unit=unit,
            split=split,
            record_format=RecordFormat(record_format, take),
            kind=kind,
            revision=revision,
        )
    if kind == "documents":
        _note_unused_take(reader)
    totals = TokenSource(out, verify=False).totals()
    rows = [
        {
            "language": code,
            **{name: entry[name] for name in ("documents", "tokens", "bytes")},
            "bytes_per_token": entry["bytes"] / entry["tokens"],
        }
        for code, entry in totals.items()
    ]

    def show() -> None:
        _table(
            ["language", "documents", "tokens", "bytes", "bytes per token"],
            [[*list(row.values())[:-1], f"{row['bytes_per_token']:.2f}"] for row in rows],
        )
        _say_format(reader)
        _say_bad(reader)

    print_answer({"languages": rows, **_reading(reader), "written": out}, show)
    note(f"written to {out}")


@data.command()
@click.argument("source", type=SOURCE)
@reading_options
def inspect(
    source: str,
    fields: tuple[str, ...],
    record_format: str | None,
    take: Any,
    language: str | None,
    domain: str | None,
    max_bad: float,
    split: str,
    unit: Any,
) -> None:
    """Count SOURCE's records by language and domain, and show the first bad ones."""
    from koine.data import RecordFormat, read_records

    reader = read_records(
        source,
        fields=field_mapping(fields),
        language=language,
        domain=domain,
        max_bad_share=max_bad,
        unit=unit,
        split=split,
        carry=(),
        record_format=RecordFormat(record_format, take),
    )
    counts: dict[tuple[str, str], list[int]] = {}
    for record in reader:
        entry = counts.setdefault((record["language"], record["domain"]), [0, 0, 0])
        entry[0] += 1
        if "messages" in record:
            entry[1] += 1
            entry[2] += sum(len(message["content"].encode("utf-8")) for message in record["messages"])
        else:
            entry[2] += len(record["text"].encode("utf-8"))
    _note_unused_take(reader)
    columns = ["language", "domain", "records", "chats", "bytes"]
    rows = [[*key, *entry] for key, entry in sorted(counts.items())]

    def show() -> None:
        _table(columns, rows)
        _say_format(reader)
        _say_bad(reader)

    groups = [dict(zip(columns, row, strict=True)) for row in rows]
    print_answer({"groups": groups, **_reading(reader)}, show)


@data.command("at-step")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("step", type=int)
def at_step(model: Path, step: int) -> None:
    """Print the documents, or the groups, in MODEL's training batch at STEP (counted from 0)."""
    from koine.data.inspect_step import documents_at_step

    slices = documents_at_step(model, step)
    columns = ["row", "source", "language", "domain", "record", "tokens", "text"]
    rows = [row for one in slices for row in _step_rows(one)]
    print_answer({"step": step, "slices": slices}, lambda: _table(columns, rows))


def _step_rows(one: dict[str, Any]) -> list[list[Any]]:
    """Return the rows of a document's slice, or of a group: its prompt, and one for each completion."""
    head = [one["row"], one["source"], one["language"], one["domain"], one["record_id"]]

    def shown(text: str) -> str:
        return " ".join(text.split())[:60]

    if "completions" not in one:
        return [[*head, f"{one['start']}-{one['end']}", shown(one["text"])]]
    rows: list[list[Any]] = [[*head, f"{one['start']}-{one['end']}", f"prompt: {shown(one['prompt'])}"]]
    for number, completion in enumerate(one["completions"]):
        named = _completion_name(one, number)
        rows.append([*[""] * len(head), completion["tokens"], f"{named}: {shown(completion['text'])}"])
    return rows


def _completion_name(group: dict[str, Any], number: int) -> str:
    """Return what the record says of a completion."""
    if group["kind"] == "preferences":
        name = ("chosen", "rejected")[number % 2]
        if number > 1:
            return f"{name} as revision of the {('chosen', 'rejected')[number // 2 - 1]}"
        probability = group["probability"] if number == 0 else 1 - group["probability"]
        return name if group["probability"] == 1 else f"{name} (better with probability {probability:g})"
    if group["kind"] == "labelled":
        return "good" if group["labels"][number] else "bad"
    return f"score {group['scores'][number]:g}"


def _reading(reader: RecordReader) -> dict[str, Any]:
    """Return what an answer says of formats, of labels that were not read, and of bad records."""
    return {
        "formats": reader.formats,
        "left_out": reader.left_out,
        "bad_records": reader.bad,
        "bad_examples": [str(example) for example in reader.examples],
    }


def _note_unused_take(reader: RecordReader) -> None:
    """Warn where `--take rejected` met no preference records."""
    if reader.record_format.take == "rejected" and not any(map(_holds_answers, reader.formats)):
        warnings.warn(
            "--take rejected changed nothing: there are no preference records", KoineWarning, stacklevel=1
        )


_OTHERS = {"chosen": "rejected", "rejected": "chosen"}


def _holds_answers(name: str) -> bool:
    """Return whether records of a format have several answers, or a label of their answer."""
    return "preference" in name or name == "scored-completions"


def _say_format(reader: RecordReader) -> None:
    """Print how the records were read, if they are not of our own fields."""
    for name, count in reader.formats.items():
        if name in ("text", "messages"):
            continue
        line = f"read as {name}: {count:,} record{'' if count == 1 else 's'}"
        take = reader.record_format.take
        if _holds_answers(name) and take == "all":
            line += ", all of their answers"
        elif name == "scored-completions":
            best, worst = ("best", "worst") if take == "chosen" else ("worst", "best")
            line += f", their {best} completions (--take {_OTHERS[take]} reads the {worst})"
        elif _holds_answers(name):
            line += f", their {take} answers (--take {_OTHERS[take]} reads the others)"
        click.echo(line)
    if reader.left_out:
        answers = "answer" if reader.left_out == 1 else "answers"
        click.echo(f"{reader.left_out:,} {answers} with the other label left out")


def _say_bad(reader: RecordReader) -> None:
    """Print the number of bad records and the first of them."""
    if reader.bad:
        click.echo(f"{reader.bad:,} bad record{'' if reader.bad == 1 else 's'} left out, the first:")
        for example in reader.examples:
            click.echo(f"  {printable(str(example))}")


def _table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table; columns of numbers are aligned right."""
    from rich.table import Table

    from koine.cli.tables import print_table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))
    ]
    for column, is_number in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*[f"{value:,}" if isinstance(value, int) else str(value) for value in row])
    print_table(table)
