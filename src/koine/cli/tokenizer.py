"""`koine tokenizer`: language weights and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

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


def weighting(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which text is read and how its languages are weighted."""
    for option in reversed(
        [
            click.option(
                "--data",
                multiple=True,
                required=True,
                type=click.Path(),
                help="Text with a language per record (file or folder); may be repeated.",
            ),
            click.option(
                "--languages", help="Only these codes, with commas between.  [default: all in the data]"
            ),
            click.option(
                "--scheme",
                type=click.Choice(SCHEMES),
                default="bucketed",
                show_default=True,
                help="How languages are weighted.",
            ),
            click.option(
                "--bucket-mass",
                type=click.Choice(BUCKET_MASSES),
                default="uniform",
                show_default=True,
                help="Mass of a bucket of languages of one family and script.",
            ),
            click.option(
                "--english-share",
                type=EnglishShare(),
                default="0.30",
                show_default=True,
                help="Share of English where it is among others; 'none' leaves it to the scheme.",
            ),
            click.option(
                "--temperature",
                default=3.0,
                show_default=True,
                help="Only for --scheme temperature: share^(1/T).",
            ),
        ]
    ):
        command = option(command)
    return command


@click.group()
def tokenizer() -> None:
    """Language weights and tokenizer training."""


@tokenizer.command()
@weighting
@click.option(
    "--vocab-size", type=int, default=32000, show_default=True, help="Number of ids, specials included."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the tokenizer to."
)
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@click.option("--sample-bytes", type=int, help="Bytes of text to train on.  [default: as many as there are]")
@click.option(
    "--max-repeats", default=10.0, show_default=True, help="Read a language at most this many times."
)
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of texts.")
def train(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
    vocab_size: int,
    out: Path,
    min_frequency: int,
    sample_bytes: int | None,
    max_repeats: float,
    seed: int,
) -> None:
    """Train a byte-level BPE tokenizer on weighted languages."""
    from koine.errors import UserError
    from koine.files import atomic_directory
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"a vocabulary of {vocab_size} is smaller than the alphabet",
            where="--vocab-size",
            mend=f"take at least {SMALLEST_VOCABULARY} (special tokens and 256 bytes)",
        )
    with atomic_directory(out) as folder:
        from koine.tokenizer import train_tokenizer

        trained = train_tokenizer(
            texts_of(data, languages),
            vocab_size=vocab_size,
            scheme=scheme,
            bucket_mass=bucket_mass,
            english_share=english_share,
            temperature=temperature,
            min_frequency=min_frequency,
            sample_bytes=sample_bytes,
            max_repeats=max_repeats,
            seed=seed,
            show_progress=True,
        )
        trained.save(folder)
    click.echo(f"{trained.vocab_size:,} tokens written to {out}")


@tokenizer.command()
@weighting
def weights(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
) -> None:
    """Show how much of each language a tokenizer would be trained on."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table

    from koine.languages import bucket
    from koine.tokenizer.sampling import count_bytes
    from koine.tokenizer.weights import language_weights

    sizes = count_bytes(texts_of(data, languages))
    shares = language_weights(
        sizes, scheme=scheme, bucket_mass=bucket_mass, english_share=english_share, temperature=temperature
    )
    total = sum(sizes.values())
    largest = max(shares.values())
    table = Table(title=f"{len(sizes)} languages, {total:,} bytes, {scheme}")
    for name in ("language", "bytes", "share", "bucket", "weight", ""):
        table.add_column(name, justify="right" if name in ("bytes", "share", "weight") else "left")
    for code in sorted(shares, key=lambda code: (-shares[code], code)):
        key = bucket(code)
        table.add_row(
            code,
            f"{sizes[code]:,}",
            f"{sizes[code] / total:.2%}",
            key if isinstance(key, str) else " / ".join(map(str, key)),
            f"{shares[code]:.2%}",
            Bar(largest, 0.0, shares[code], width=24),
        )
    Console().print(table)


def texts_of(paths: tuple[str, ...], languages: str | None) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that reads (language, text) of the chosen languages anew at each call."""
    from koine.errors import UserError, did_you_mean
    from koine.languages import language

    where = ", ".join(paths)
    chosen = None
    if languages is not None:
        chosen = {language(code.strip()).code for code in languages.split(",") if code.strip()}
    checked = False

    def read() -> Iterator[tuple[str, str]]:
        nonlocal checked
        present = set()
        for path in paths:
            for code, text in _texts(path):
                present.add(code)
                if chosen is None or code in chosen:
                    yield code, text
        if not checked:
            for code in sorted(chosen or ()):
                if code not in present:
                    raise UserError(
                        f"no text of language '{code}'", where=where, mend=did_you_mean(code, present)
                    )
            checked = True

    return read


def _texts(path: str) -> Iterator[tuple[str, str]]:
    from koine.data.records import read_records
    from koine.errors import UserError

    for record in read_records(path):
        code = record.get("language")
        if not code:
            raise UserError("a record without a language", where=path, mend='give each record a "language"')
        if "text" in record:
            yield code, record["text"]
        else:
            for message in record["messages"]:
                yield code, message["content"]
