"""`koine tokenizer weights`: the options that weight languages, and a table of the weights they give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import LANGUAGES
from koine.cli.commands import Command
from koine.cli.tables import print_table
from koine.cli.tokenizer.texts import texts_of

SCHEMES = ("bucketed", "natural", "uniform", "temperature")
BUCKET_MASSES = ("uniform", "data")


class EnglishShare(click.ParamType[float | None]):
    """A number between 0 and 1, or `none`."""

    name = "SHARE|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value is None or str(value).lower() == "none":
            return None
        try:
            return float(value)
        except ValueError:
            self.fail(f"'{value}' is neither a number nor 'none'", param, ctx)


def weighting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that choose the text and weight its languages."""
    for option in reversed(
        [
            click.option(
                "--data",
                multiple=True,
                required=True,
                type=click.Path(),
                help="Text with a language per record (file or folder); repeatable.",
            ),
            click.option(
                "--languages",
                type=LANGUAGES,
                help="Comma-separated codes to use.  [default: all in the data]",
            ),
            click.option(
                "--scheme",
                type=click.Choice(SCHEMES),
                default="bucketed",
                show_default=True,
                help="How languages are weighted: by family and script (bucketed), by size (natural), all "
                "the same (uniform), or by size to the power 1/T (temperature).",
            ),
            click.option(
                "--bucket-mass",
                type=click.Choice(BUCKET_MASSES),
                default="uniform",
                show_default=True,
                help="For bucketed: weight of a bucket (the languages of one family and script). The same "
                "for every bucket (uniform), or its share of the data (data).",
            ),
            click.option(
                "--english-share",
                type=EnglishShare(),
                default="0.30",
                show_default=True,
                help="Weight of English among other languages; 'none' leaves it to --scheme.",
            ),
            click.option(
                "--temperature",
                default=3.0,
                show_default=True,
                help="T of --scheme temperature; larger is more uniform.",
            ),
            click.option("--sample-bytes", type=int, help="Bytes of text to train on.  [default: all]"),
            click.option(
                "--max-repeats",
                default=10.0,
                show_default=True,
                help="Most passes over a language's text to reach its weight.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.command(cls=Command)
@weighting_options
def weights(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
    sample_bytes: int | None,
    max_repeats: float,
) -> None:
    """Show the weight of each language in a tokenizer's training, and the passes over its text."""
    from rich.bar import Bar
    from rich.table import Table

    from koine.languages import bucket
    from koine.tokenizer.corpus_sampling import count_bytes, quotas
    from koine.tokenizer.weights import language_weights

    sizes = count_bytes(texts_of(data, languages))
    shares = language_weights(
        sizes, scheme=scheme, bucket_mass=bucket_mass, english_share=english_share, temperature=temperature
    )
    drawn = quotas(sizes, shares, sample_bytes=sample_bytes, max_repeats=max_repeats)
    total = sum(sizes.values())
    largest = max(shares.values())
    rows: list[dict[str, Any]] = [
        {
            "language": code,
            "bytes": sizes[code],
            "share": sizes[code] / total,
            "bucket": key if isinstance(key := bucket(code), str) else " / ".join(map(str, key)),
            "weight": shares[code],
            "passes": drawn[code] / sizes[code],
        }
        for code in sorted(shares, key=lambda code: (-shares[code], code))
    ]
    table = Table(title=f"{len(sizes)} languages, {total:,} bytes, {scheme}", title_justify="left")
    for name in ("language", "bytes", "share", "bucket", "weight", "passes", ""):
        table.add_column(name, justify="right" if name in ("bytes", "share", "weight", "passes") else "left")
    for row in rows:
        table.add_row(
            row["language"],
            f"{row['bytes']:,}",
            f"{row['share']:.2%}",
            row["bucket"],
            f"{row['weight']:.2%}",
            f"{row['passes']:.2f}×",
            Bar(largest, 0.0, row["weight"], width=8),
        )
    print_answer({"scheme": scheme, "languages": rows}, lambda: print_table(table))
