"""`koine tokenizer`: language weights, training, measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from koine.cli.outputs import OVERWRITE, output_files
from koine.cli.tables import print_table
from koine.cli.tokenizer.extend import extend
from koine.cli.tokenizer.tables import show_measures
from koine.cli.tokenizer.texts import codes_of, texts_of, units_of

SCHEMES = ("bucketed", "natural", "uniform", "temperature")
BUCKET_MASSES = ("uniform", "data")
INITIALISATIONS = ("random", "mean", "subword-mean", "focus", "distill")


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
            click.option(
                "--sample-bytes", type=int, help="Bytes of text to train on.  [default: as many as there are]"
            ),
            click.option(
                "--max-repeats",
                default=10.0,
                show_default=True,
                help="Read a language at most this many times.",
            ),
        ]
    ):
        command = option(command)
    return command


@click.group()
def tokenizer() -> None:
    """Train tokenizers, compare them, move models to them."""


@tokenizer.command()
@weighting
@click.option(
    "--vocab-size", type=int, default=32000, show_default=True, help="Number of ids, specials included."
)
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the tokenizer to."
)
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@OVERWRITE
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of texts.")
def train(
    data: tuple[str, ...],
    languages: str | None,
    scheme: Any,
    bucket_mass: Any,
    english_share: float | None,
    temperature: float,
    sample_bytes: int | None,
    max_repeats: float,
    vocab_size: int,
    out: Path,
    overwrite: bool,
    min_frequency: int,
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
            hint=f"take at least {SMALLEST_VOCABULARY} (special tokens and 256 bytes)",
        )
    with atomic_directory(out, overwrite=overwrite, reads=map(Path, data)) as folder:
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
            data=data,
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
    sample_bytes: int | None,
    max_repeats: float,
) -> None:
    """Show how much of each language a tokenizer would be trained on, and how often it would be read."""
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
    table = Table(title=f"{len(sizes)} languages, {total:,} bytes, {scheme}", title_justify="left")
    for name in ("language", "bytes", "share", "bucket", "weight", "read", ""):
        table.add_column(name, justify="right" if name in ("bytes", "share", "weight", "read") else "left")
    for code in sorted(shares, key=lambda code: (-shares[code], code)):
        key = bucket(code)
        table.add_row(
            code,
            f"{sizes[code]:,}",
            f"{sizes[code] / total:.2%}",
            key if isinstance(key, str) else " / ".join(map(str, key)),
            f"{shares[code]:.2%}",
            f"{drawn[code] / sizes[code]:.2f}×",
            Bar(largest, 0.0, shares[code], width=8),
        )
    print_table(table)


@tokenizer.command()
@click.argument("tokenizers", nargs=-1, required=True)
@click.option(
    "--data",
    multiple=True,
    required=True,
    type=click.Path(),
    help="Text with a language per record, or with a text per language in each record (parallel); may be repeated.",
)
@click.option("--languages", help="Only these codes, with commas between.  [default: all in the data]")
@click.option(
    "--parallel", is_flag=True, help="Records of different languages with equal ids are translations."
)
@click.option("--split", help="Only records whose field 'split' says this.")
@click.option("--max-bytes", type=int, help="At most this many bytes of each language.  [default: all]")
@click.option("--price", type=float, help="Price of a million tokens, for the cost of a megabyte.")
@click.option(
    "--max-bad", default=0.01, show_default=True, help="Stop where a larger share of records is bad."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the measures as JSON to this file.")
@click.option(
    "--report", type=click.Path(path_type=Path), help="Write tables and heat maps as HTML to this file."
)
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
    """Compare TOKENIZERS on the same text: folders with tokenizer.json, folders of transformers, .tiktoken files, SentencePiece .model files.

    Bytes per token, tokens per word, parity with English on parallel text, Gini over languages, Rényi efficiency, partial characters, the
    vocabulary by script, speed. The definitions are in docs/how-to/tokenizer.md.
    """
    from koine.errors import UserError
    from koine.files import write_json
    from koine.tokenizer.loaders import open_tokenizer
    from koine.tokenizer.measures import measure as measure_tokenizers

    names = [str(Path(name)) for name in tokenizers]
    if len(set(names)) < len(names):
        raise UserError("a tokenizer is given twice", hint="give each once")
    outputs = {"--out": out, "--report": report}
    with output_files(outputs, overwrite=overwrite, reads=[*names, *data]) as targets:
        opened = {name: open_tokenizer(name) for name in names}
        units = units_of(
            data, languages, parallel=parallel, split=split, max_bytes=max_bytes, max_bad_share=max_bad
        )
        result = measure_tokenizers(opened, units, languages=codes_of(languages), price_per_million=price)
        if (target := targets["--out"]) is not None:
            write_json(target, result)
        if (target := targets["--report"]) is not None:
            write_comparison(target, names, result)
    show_measures(result)
    for target in (out, report):
        if target is not None:
            click.echo(f"written to {target}")


def write_comparison(report: Path, names: list[str], result: dict[str, Any]) -> None:
    """Write the page of `koine tokenizer measure`."""
    from koine.plan.report.page import write_page
    from koine.tokenizer.comparison import blocks

    rows = result[names[0]].values()
    facts = [
        ("Languages", str(result[names[0]]["overall"]["languages"])),
        ("Text", f"{sum(row['bytes'] for row in rows if 'languages' not in row) / 1e6:.1f} MB"),
        ("Tokenizers", str(len(names))),
    ]
    write_page(report, name="Tokenizers side by side", sections=[("Comparison", blocks(result))], facts=facts)


@tokenizer.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer", "target", type=click.Path(path_type=Path), required=True, help="The tokenizer to move to."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option(
    "--init",
    type=click.Choice(INITIALISATIONS),
    default="subword-mean",
    show_default=True,
    help="First guess for the rows of new tokens.",
)
@click.option("--text", multiple=True, type=click.Path(), help="Text to learn from, for focus and distill.")
@click.option(
    "--max-bytes", default=2_000_000, show_default=True, help="Bytes of that text of each language."
)
@OVERWRITE
@click.option("--seed", default=0, show_default=True, help="Seed of random and distill.")
def adapt(
    model: Path,
    target: Path,
    out: Path,
    overwrite: bool,
    init: Any,
    text: tuple[str, ...],
    max_bytes: int,
    seed: int,
) -> None:
    """Move MODEL, any causal language model with a tokenizer.json, to another tokenizer.

    Shared tokens keep their rows. Where the new vocabulary holds the whole old one, moving back gives the old weights again.
    """
    from koine.files import atomic_directory
    from koine.model.adapt import move_model

    texts = None
    if text:
        units = units_of(text, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01)
        texts = (unit.text for unit in units)
    with atomic_directory(out, overwrite=overwrite, reads=[model, target, *map(Path, text)]) as folder:
        moved = move_model(model, target, folder, method=init, texts=texts, seed=seed)
    click.echo(
        f"{moved.rows:,} tokens: {moved.shared:,} keep their rows, {moved.spelled:,} are new ({init}), "
        f"{moved.unspelled:,} have no spelling (mean); {moved.dropped:,} old tokens dropped"
        + (f"; {moved.padding:,} rows of padding kept" if moved.padding else "")
        + (": moving back gives the old weights again" if moved.reversible else "")
    )
    click.echo(f"written to {out}")


@tokenizer.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text of all these languages.")
@click.option("--primary", required=True, help="Codes of the languages that the model was pretrained on.")
@click.option("--max-bytes", default=200_000, show_default=True, help="Bytes of each language to look at.")
def predict(base: Path, data: tuple[str, ...], primary: str, max_bytes: int) -> None:
    """Rank languages by how dear it will be to adapt a model with the tokenizer BASE to them, before any training."""
    from rich.table import Table

    from koine.languages import language
    from koine.tokenizer.loaders import open_tokenizer
    from koine.tokenizer.predict import predict_costs

    texts: dict[str, list[str]] = {}
    for unit in units_of(data, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01):
        texts.setdefault(unit.language, []).append(unit.text)
    codes = [language(code.strip()).code for code in primary.split(",") if code.strip()]
    table = Table(title="expected cost of adaptation, the dearest first")
    for name in ("language", "name", "tokens per byte", "letters seen", "cost"):
        table.add_column(name, justify="left" if name in ("language", "name") else "right")
    for one in predict_costs(open_tokenizer(base), texts, primary=codes):
        name = language(one.language).name if one.language != "und" else "unknown"
        table.add_row(
            one.language, name, f"{one.tokens_per_byte:.3f}", f"{one.script_overlap:.0%}", f"{one.cost:.2f}"
        )
    print_table(table)


tokenizer.add_command(extend)
