"""The data options of `koine train`, and the mixture that they describe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.outputs import InputFile
from koine.errors import UserError
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.data.mixture import LongRows, Mixture, Source

Command = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Options of `koine train` that choose the data."""

    data: tuple[str, ...]
    mixture: Path | None
    steps: int | None
    sequence_length: int
    batch_size: int
    packing: Any
    cross_document_attention: bool
    fresh_data: bool
    long_every: int | None
    long_sequence_length: int | None
    long_batch_size: int | None
    long_data: tuple[str, ...]
    long_min_tokens: int | None


class _PackingChoice(click.Choice[str]):
    """The packings of `Mixture`, by their names of today or before version 0.1.0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from koine.data.mixture import current_packing

        return super().convert(current_packing(value), param, ctx)


def data_options(*, packing: str, sequence_length: int) -> Callable[[Command], Command]:
    """Add one option for each field of `DataOptions`, with these defaults."""
    options = (
        click.option(
            "--data",
            multiple=True,
            metavar="TOKENS[:PROPORTION]",
            help="Folder written by `koine data tokenize`, and its share of the batches, "
            "for example web:0.8. Repeat it for a mixture.  [required without --mixture]",
        ),
        click.option(
            "--mixture",
            type=InputFile(),
            help="JSON file of a mixture (phases, languages), in place of --data, --steps, --batch-size, "
            "--sequence-length and --packing.",
        ),
        click.option("--steps", type=int, help="Number of optimiser steps.  [required without --mixture]"),
        click.option(
            "--sequence-length",
            type=int,
            default=sequence_length,
            show_default=True,
            help="Tokens of a sequence.",
        ),
        click.option(
            "--batch-size",
            type=int,
            default=8,
            show_default=True,
            help="Sequences of a step, over all processes.",
        ),
        click.option(
            "--packing",
            type=_PackingChoice(["concat", "no_split", "one_per_row"]),
            default=packing,
            show_default=True,
            help="concat: documents are joined and cut at a sequence's end; no_split: they are not cut; "
            "one_per_row: one document a sequence, padded.",
        ),
        click.option(
            "--cross-document-attention",
            is_flag=True,
            help="Let attention and targets cross from one document of a sequence to the next.",
        ),
        click.option(
            "--fresh-data",
            is_flag=True,
            help="Start each source after the documents that --model was trained on (with the same --seed).",
        ),
        click.option("--long-every", type=int, help="Make every n-th step a batch of long sequences."),
        click.option("--long-sequence-length", type=int, help="Tokens of a long sequence."),
        click.option("--long-batch-size", type=int, help="Sequences of such a step, over all processes."),
        click.option(
            "--long-data",
            multiple=True,
            metavar="TOKENS[:PROPORTION]",
            help="Token shards of the long sequences; repeatable.  [default: those of --data]",
        ),
        click.option(
            "--long-min-tokens",
            type=int,
            help="Fill long sequences with documents of at least this many tokens.",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def build_mixture(options: DataOptions, seed: int) -> Mixture:
    """Return the mixture of a file, or one phase of the sources given with --data.

    Raises `UserError` for options that contradict each other or are out of their bounds.
    """
    from koine.data import Mixture, Phase

    long_rows = _build_long_rows(options)
    if (options.mixture is None) == (not options.data):
        raise UserError("give either --data or --mixture", hint="--data TOKENS[:PROPORTION] may be repeated")
    if options.mixture is not None:
        from koine.files import read_json

        if long_rows is not None:
            raise UserError("--long-every with --mixture", hint="write `long` in a phase of the mixture")
        return Mixture.from_json(read_json(options.mixture), where=options.mixture)
    if options.steps is None or options.steps < 1:
        raise UserError(f"steps is {options.steps}", hint="give --steps with a number of at least 1")
    check_integer("batch_size", options.batch_size, low=1)
    check_integer("sequence_length", options.sequence_length, low=1)
    phase = Phase(
        name="train", steps=options.steps, sources=tuple(_parse_sources(options.data)), long=long_rows
    )
    return Mixture(
        phases=(phase,),
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        packing=options.packing,
        cross_document_attention=options.cross_document_attention,
        seed=seed,
    )


def _build_long_rows(options: DataOptions) -> LongRows | None:
    """Return the batches of long rows; None where no option speaks of them."""
    from koine.data import LongRows

    sizes = (options.long_every, options.long_sequence_length, options.long_batch_size)
    if sizes == (None, None, None) and options.long_min_tokens is None and not options.long_data:
        return None
    every, sequence_length, batch_size = sizes
    if every is None or sequence_length is None or batch_size is None:
        raise UserError(
            "batches of long sequences are not wholly described",
            hint="give --long-every, --long-sequence-length and --long-batch-size",
        )
    sources: tuple[Source, ...] = ()
    if options.long_data or options.long_min_tokens:
        # Names of their own: --data may have a folder of the same name, or the same folder with all
        # documents.
        sources = tuple(
            replace(source, name=f"long-{source.name}", min_tokens=options.long_min_tokens)
            for source in _parse_sources(options.long_data or options.data)
        )
    return LongRows(every=every, sequence_length=sequence_length, batch_size=batch_size, sources=sources)


def _parse_sources(data: tuple[str, ...]) -> list[Source]:
    """Return the sources of `PATH[:PROPORTION]`: all have a proportion, or none has (equal shares)."""
    from koine.data import Source

    parsed = [_parse_source(text) for text in data]
    proportions = [proportion for _, proportion in parsed if proportion is not None]
    if proportions and len(proportions) != len(parsed):
        raise UserError(
            "some --data have a proportion and some have none", hint="give it for all or for none"
        )
    _check_different_folders(parsed)
    names = [Path(path).name for path, _ in parsed]
    return [
        Source(
            name=name if names.count(name) == 1 else path,
            path=Path(path),
            proportion=proportion if proportion is not None else 1.0 / len(parsed),
        )
        for name, (path, proportion) in zip(names, parsed, strict=True)
    ]


def _parse_source(text: str) -> tuple[str, float | None]:
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, None
    try:
        return path, float(number)
    except ValueError:
        raise UserError(
            f"'{number}' is no proportion", where=text, hint="write PATH:0.3, for example"
        ) from None


def _check_different_folders(parsed: list[tuple[str, float | None]]) -> None:
    """Raise `UserError` for a folder that is given twice."""
    folders = [Path(path).resolve() for path, _ in parsed]
    for (path, proportion), folder in zip(parsed, folders, strict=True):
        if folders.count(folder) == 1:
            continue
        total = sum(
            share or 0.0 for (_, share), other in zip(parsed, folders, strict=True) if other == folder
        )
        raise UserError(
            "is given more than once",
            where=path,
            hint=f"give it once: {path}:{total:g}" if proportion is not None else "give it once",
        )
