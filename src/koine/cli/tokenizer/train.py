"""`koine tokenizer train`: train a byte-level BPE tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.cli.tokenizer.texts import texts_of
from koine.cli.tokenizer.weights import weighting_options


@click.command()
@weighting_options
@click.option(
    "--vocab-size",
    type=int,
    default=32000,
    show_default=True,
    help="Number of tokens, special tokens included.",
)
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write.")
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@OVERWRITE
@click.option("--seed", default=0, show_default=True, help="Random seed for sampling the texts.")
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
    with (
        recorded_output(out, {"data": data}),
        atomic_directory(out, overwrite=overwrite, reads=map(Path, data)) as folder,
    ):
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
