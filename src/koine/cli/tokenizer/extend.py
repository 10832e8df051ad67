"""`koine tokenizer extend`: add tokens for more languages, and compare with a tokenizer from scratch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from koine.cli.arguments import TOKENIZER
from koine.cli.outputs import OVERWRITE, OutputFolder
from koine.cli.recording import recorded_output
from koine.cli.tokenizer.tables import show_measures
from koine.cli.tokenizer.texts import texts_of
from koine.errors import KoineWarning

if TYPE_CHECKING:
    from koine.tokenizer.token_bytes import AnyTokenizer

Texts = Callable[[], Iterator[tuple[str, str]]]


@click.command()
@click.argument("base", type=TOKENIZER)
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text in the languages to add.")
@click.option("--languages", help="Comma-separated codes to add.  [default: all in the data]")
@click.option("--tokens", type=int, required=True, help="Number of tokens to add.")
@click.option("--out", type=OutputFolder(), required=True, help="Folder to write.")
@OVERWRITE
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@click.option(
    "--compare", is_flag=True, help="Also train a tokenizer of the same size from scratch, and compare."
)
@click.option(
    "--heldout",
    multiple=True,
    type=click.Path(),
    help="Text to measure on.  [default: every 20th text of --data, which is left out of training]",
)
def extend(
    base: Path,
    data: tuple[str, ...],
    languages: str | None,
    tokens: int,
    out: Path,
    overwrite: bool,
    min_frequency: int,
    compare: bool,
    heldout: tuple[str, ...],
) -> None:
    """Add tokens for more languages to the BPE tokenizer BASE, keeping every old id and every old merge.

    Languages of the data that BASE was trained on are measured too, and the tokenizer of --compare is trained
    on both.
    """
    from koine.files import atomic_directory
    from koine.tokenizer import extend_tokenizer, load_tokenizer, open_tokenizer, train_tokenizer
    from koine.tokenizer.holdout import EVERY

    load_tokenizer(base)
    text = _split_text(base, data, languages, heldout)
    reads = [base, *map(Path, data)]
    with (
        recorded_output(out, {"base": base, "data": data}),
        atomic_directory(out, overwrite=overwrite, reads=reads) as folder,
    ):
        extended = extend_tokenizer(
            base,
            (one for _, one in text.added()),
            new_tokens=tokens,
            min_frequency=min_frequency,
            training={
                "data": list(data),
                "languages": {code: {"bytes": size} for code, size in text.sizes.items()},
                "base_languages": text.base_languages,
                "sample": "all texts" if heldout else f"all but every {EVERY}th text of each language",
                "seed": None,
            },
        )
        extended.tokenizer.save(folder)
        opened: dict[str, AnyTokenizer] = {"before": open_tokenizer(base), "extended": extended.tokenizer}
        if compare:
            if not text.old:
                warnings.warn(
                    "the data has no text of the base's languages, so the tokenizer from scratch learns only "
                    "the added ones; give it with --data, and name the added languages with --languages",
                    KoineWarning,
                    stacklevel=2,
                )
            opened["from scratch"] = train_tokenizer(
                text.all,
                vocab_size=extended.tokenizer.vocab_size,
                min_frequency=min_frequency,
                scheme="natural",
                english_share=None,
            )
    click.echo(
        f"{extended.added_tokens:,} tokens ({extended.added_characters:,} of them characters) and "
        f"{extended.added_merges:,} merges added; written to {out}"
    )
    added_codes = ", ".join(text.sizes)
    click.echo(f"added languages: {added_codes}; the base's: {', '.join(text.old) or 'none in the data'}")
    if compare:
        click.echo(
            f"from scratch: {opened['from scratch'].vocab_size:,} tokens learnt from "
            f"{', '.join([*text.sizes, *text.old])}, weighted by size"
        )
    _measure(opened, text.measured, heldout)


@dataclass(frozen=True)
class _Text:
    """The text of one extension; each reader gives (language, text) anew at each call."""

    added: Texts
    """Text of the languages to add, without what is held out."""
    all: Texts
    """The same with text of the base's own languages."""
    measured: Texts
    """Text that nothing is learnt from."""
    sizes: dict[str, int]
    """Bytes of each language in `added`."""
    old: list[str]
    """Languages of the data that the base knows and that are not added."""
    base_languages: list[str]
    """Languages of the base's own record."""


def _split_text(base: Path, data: tuple[str, ...], languages: str | None, heldout: tuple[str, ...]) -> _Text:
    """Divide the data into text to learn from and text to measure on."""
    from koine.tokenizer.corpus_sampling import count_bytes
    from koine.tokenizer.extend import trained_languages
    from koine.tokenizer.holdout import EVERY, split_texts

    known = trained_languages(base)
    added = split_texts(texts_of(data, languages), heldout=False, every=None if heldout else EVERY)
    sizes = count_bytes(added)
    present = count_bytes(texts_of(data, None))
    old = sorted(code for code in present if code not in sizes and (known is None or code in known))
    everything = texts_of(data, ",".join([*sizes, *old]))
    if heldout:
        learnt, measured = everything, texts_of(heldout, None)
    else:
        learnt = split_texts(everything, heldout=False)
        measured = split_texts(everything, heldout=True)
    return _Text(added, learnt, measured, sizes, old, sorted(known or ()))


def _measure(tokenizers: dict[str, AnyTokenizer], measured: Texts, heldout: tuple[str, ...]) -> None:
    """Print the measures of the tokenizers on held-out text, or a warning where there is none."""
    from koine.tokenizer import MeasuredText, measure
    from koine.tokenizer.holdout import EVERY

    texts = [MeasuredText(code, text) for code, text in measured()]
    if not texts:
        warnings.warn(
            "too little text to hold any out; nothing is measured; give --heldout", KoineWarning, stacklevel=3
        )
        return
    source = ", ".join(heldout) or f"every {EVERY}th text, left out of training"
    click.echo(f"measured on {source}:")
    show_measures(measure(tokenizers, texts))
