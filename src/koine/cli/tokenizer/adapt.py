"""`koine tokenizer adapt`: move a model to another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from koine.cli.arguments import MODEL, TOKENIZER
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.cli.tokenizer.texts import read_measured_texts

INITIALISATIONS = ("random", "mean", "subword-mean", "focus", "distill")


@click.command()
@click.argument("model", type=MODEL)
@click.option("--tokenizer", "target", type=TOKENIZER, required=True, help="The tokenizer to move to.")
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write the model to.")
@click.option(
    "--init",
    type=click.Choice(INITIALISATIONS),
    default="subword-mean",
    show_default=True,
    help="How the embeddings of new tokens are initialised.",
)
@click.option("--text", multiple=True, type=click.Path(), help="Text to learn from, for focus and distill.")
@click.option(
    "--max-bytes", default=2_000_000, show_default=True, help="Most bytes of --text of each language."
)
@OVERWRITE
@click.option("--seed", default=0, show_default=True, help="Random seed of random and distill.")
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

    Tokens that both vocabularies have keep their embeddings. If the new vocabulary holds the whole old one,
    moving back restores the old weights.
    """
    from koine.files import atomic_directory
    from koine.model.adapt.vocabulary_transfer import write_moved_model

    texts = None
    if text:
        measured = read_measured_texts(
            text, None, parallel=False, split=None, max_bytes=max_bytes, max_bad_share=0.01
        )
        texts = (one.text for one in measured)
    with (
        recorded_output(out, {"model": model, "tokenizer": target, "text": text}),
        atomic_directory(out, overwrite=overwrite, reads=[model, target, *map(Path, text)]) as folder,
    ):
        moved = write_moved_model(model, target, folder, method=init, texts=texts, seed=seed)
    click.echo(
        f"{moved.rows:,} tokens: {moved.shared:,} keep their rows, {moved.spelled:,} are new ({init}), "
        f"{moved.unspelled:,} have no spelling (mean); {moved.dropped:,} old tokens dropped"
        + (f"; {moved.padding:,} rows of padding kept" if moved.padding else "")
        + (": moving back gives the old weights again" if moved.reversible else "")
    )
    click.echo(f"written to {out}")
