"""`koine tokenizer measure`: compare tokenizers on the same text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.outputs import OVERWRITE, OutputFile, output_files, say_written
from koine.cli.tokenizer.tables import show_measures
from koine.cli.tokenizer.texts import codes_of, read_measured_texts


@click.command()
@click.argument("tokenizers", nargs=-1, required=True)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(),
    help="Text with a language per record, or one text per language in each record (parallel); repeatable.",
)
@click.option("--languages", help="Comma-separated codes to report.  [default: all in the data]")
@click.option(
    "--parallel", is_flag=True, help="Records of different languages with equal ids are translations."
)
@click.option("--split", help="Only records whose field 'split' has this value.")
@click.option("--max-bytes", type=int, help="Most bytes of text of each language.  [default: all]")
@click.option("--price", type=float, help="Price of a million tokens, for the cost of a megabyte of text.")
@click.option(
    "--max-bad", default=0.01, show_default=True, help="Stop if a larger share of the records is bad."
)
@click.option("--out", type=OutputFile(), help="JSON file to write the measures to.")
@click.option("--report", type=OutputFile(), help="HTML file to write with tables and heat maps.")
@OVERWRITE
def measure(
    tokenizers: tuple[str, ...],
    data: tuple[str, ...],
    languages: str | None,
    parallel: bool,
    split: str | None,
    max_bytes: int | None,
    price: float | None,
    max_bad: float,
    out: Path | None,
    report: Path | None,
    overwrite: bool,
) -> None:
    """Compare TOKENIZERS on the same text.

    A tokenizer is a folder with a tokenizer.json, a folder of transformers, a .tiktoken file, or a
    SentencePiece .model file.

    Measures bytes per token, tokens per word, parity with English on parallel text, Gini over languages,
    Rényi efficiency, partial characters, the vocabulary by script, and speed.
    """
    from koine.errors import UserError
    from koine.files import write_json
    from koine.tokenizer import measure as measure_tokenizers
    from koine.tokenizer import open_tokenizer

    names = [str(Path(name)) for name in tokenizers]
    if len(set(names)) < len(names):
        raise UserError("a tokenizer is given twice", hint="give each once")
    outputs = {"--out": out, "--report": report}
    with output_files(outputs, overwrite=overwrite, reads=[*names, *data]) as targets:
        opened = {name: open_tokenizer(name) for name in names}
        texts = read_measured_texts(
            data, languages, parallel=parallel, split=split, max_bytes=max_bytes, max_bad_share=max_bad
        )
        result = measure_tokenizers(opened, texts, languages=codes_of(languages), price_per_million=price)
        if (target := targets["--out"]) is not None:
            write_json(target, result)
        if (target := targets["--report"]) is not None:
            write_comparison(target, names, result)
    show_measures(result)
    say_written(out, report)


def write_comparison(report: Path, names: list[str], result: dict[str, Any]) -> None:
    """Write the HTML report of `koine tokenizer measure`."""
    from koine.plan.report.page import write_page
    from koine.tokenizer.comparison import blocks

    rows = result[names[0]].values()
    facts = [
        ("Languages", str(result[names[0]]["overall"]["languages"])),
        ("Text", f"{sum(row['bytes'] for row in rows if 'languages' not in row) / 1e6:.1f} MB"),
        ("Tokenizers", str(len(names))),
    ]
    write_page(
        report, name="Comparison of tokenizers", sections=[("Comparison", blocks(result))], facts=facts
    )
