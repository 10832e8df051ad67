"""`koine tokenizer extend`: more languages for a tokenizer, and what that gives beside one from scratch."""

from __future__ import annotations

import warnings
from pathlib import Path

import click

from koine.cli.outputs import OVERWRITE
from koine.cli.tokenizer.tables import show_measures
from koine.cli.tokenizer.texts import texts_of


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, required=True, type=click.Path(), help="Text in the languages to add.")
@click.option("--languages", help="Only these codes, with commas between.  [default: all in the data]")
@click.option("--tokens", type=int, required=True, help="How many tokens to add.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder to write the tokenizer to."
)
@OVERWRITE
@click.option("--min-frequency", default=5, show_default=True, help="Merge only pairs that occur this often.")
@click.option(
    "--compare", is_flag=True, help="Also train a tokenizer of the same size from scratch, and compare."
)
@click.option(
    "--heldout",
    multiple=True,
    type=click.Path(),
    help="Text to measure on.  [default: every 20th text of --data, which is not learnt from]",
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
    """Add tokens to the BPE tokenizer BASE for more languages, keeping every old id and every old merge.

    Other languages of the data that BASE was trained on are measured too, and the tokenizer of --compare learns them with the new ones.
    """
    from koine.errors import KoineWarning
    from koine.files import atomic_directory
    from koine.tokenizer import load_tokenizer, train_tokenizer
    from koine.tokenizer.corpus_sampling import count_bytes
    from koine.tokenizer.extend import extend_tokenizer, trained_languages
    from koine.tokenizer.holdout import EVERY, split_texts
    from koine.tokenizer.loaders import open_tokenizer
    from koine.tokenizer.measures import MeasuredText
    from koine.tokenizer.measures import measure as measure_tokenizers
    from koine.tokenizer.token_bytes import AnyTokenizer

    load_tokenizer(base)
    known = trained_languages(base)
    new_text = split_texts(texts_of(data, languages), heldout=False, every=None if heldout else EVERY)
    sizes = count_bytes(new_text)
    everything = texts_of(data, None)
    present = count_bytes(everything)
    old = sorted(code for code in present if code not in sizes and (known is None or code in known))
    chosen = ",".join([*sizes, *old])
    if heldout:
        measured = texts_of(heldout, None)
        scratch_text = texts_of(data, chosen)
    else:
        measured = split_texts(texts_of(data, chosen), heldout=True)
        scratch_text = split_texts(texts_of(data, chosen), heldout=False)
    reads = [base, *map(Path, data)]
    with atomic_directory(out, overwrite=overwrite, reads=reads) as folder:
        extended = extend_tokenizer(
            base,
            ((text, 1) for _, text in new_text()),
            new_tokens=tokens,
            min_frequency=min_frequency,
            training={
                "data": list(data),
                "languages": {code: {"bytes": size} for code, size in sizes.items()},
                "base_languages": sorted(known or ()),
                "sample": "all texts" if heldout else f"all but every {EVERY}th text of each language",
                "seed": None,
            },
        )
        extended.tokenizer.save(folder)
        opened: dict[str, AnyTokenizer] = {"before": open_tokenizer(base), "extended": extended.tokenizer}
        if compare:
            if not old:
                warnings.warn(
                    "the data has no text of the base's languages, so that the tokenizer from scratch learns the added ones alone; "
                    "give it with --data, and name the added languages with --languages",
                    KoineWarning,
                    stacklevel=2,
                )
            opened["from scratch"] = train_tokenizer(
                scratch_text,
                vocab_size=extended.tokenizer.vocab_size,
                min_frequency=min_frequency,
                scheme="natural",
                english_share=None,
            )
    click.echo(
        f"{extended.added_tokens:,} tokens ({extended.added_characters:,} of them characters) and {extended.added_merges:,} merges added; "
        f"written to {out}"
    )
    added_codes = ", ".join(sizes)
    click.echo(f"added languages: {added_codes}; the base's: {', '.join(old) or 'none in the data'}")
    if compare:
        click.echo(
            f"from scratch: {opened['from scratch'].vocab_size:,} tokens learnt from {', '.join([*sizes, *old])}, weighted as they are"
        )
    units = [MeasuredText(code, text) for code, text in measured()]
    if not units:
        warnings.warn(
            "too little text to hold any out; nothing is measured; give --heldout", KoineWarning, stacklevel=2
        )
        return
    click.echo(f"measured on {', '.join(heldout) or f'every {EVERY}th text, which nothing was learnt from'}:")
    show_measures(measure_tokenizers(opened, units))
