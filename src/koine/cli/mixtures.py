"""The mixture that the options of `koine train` describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import UserError

if TYPE_CHECKING:
    from koine.data.mixture import LongRows, Mixture, Source


def read_mixture(
    data: tuple[str, ...],
    mixture: Path | None,
    steps: int | None,
    sequence_length: int,
    batch_size: int,
    long: LongRows | None,
    **fields: Any,
) -> Mixture:
    """The mixture of a file, or one phase of the sources given with --data; `fields` are more of `Mixture`."""
    from koine.data import Mixture, Phase

    if (mixture is None) == (not data):
        raise UserError("give either --data or --mixture", hint="--data TOKENS[:PROPORTION] may be repeated")
    if mixture is not None:
        from koine.files import read_json

        if long is not None:
            raise UserError("--long-every with --mixture", hint="say `long` in a phase of the mixture")
        return Mixture.from_json(read_json(mixture), where=mixture)
    if steps is None or steps < 1:
        raise UserError(f"steps is {steps}", hint="give --steps with a number of at least 1")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value < 1:
            raise UserError(f"{name} is {value}", hint="it must be at least 1")
    phase = Phase(name="train", steps=steps, sources=tuple(read_sources(data)), long=long)
    return Mixture(phases=(phase,), sequence_length=sequence_length, batch_size=batch_size, **fields)


def read_long_rows(
    every: int | None,
    sequence_length: int | None,
    batch_size: int | None,
    data: tuple[str, ...],
    min_tokens: int | None,
    *,
    others: tuple[str, ...],
) -> LongRows | None:
    """The batches of long sequences, from `data` or else from what the `others` are drawn from; the first three numbers are given, or nothing is."""
    from koine.data import LongRows

    if every is None and sequence_length is None and batch_size is None and min_tokens is None and not data:
        return None
    if every is None or sequence_length is None or batch_size is None:
        raise UserError(
            "batches of long sequences are not wholly described",
            hint="give --long-every, --long-sequence-length and --long-batch-size",
        )
    # Under names of their own: the others may be drawn from a folder of the same name, or from short documents too.
    sources = tuple(
        replace(source, name=f"long-{source.name}", min_tokens=min_tokens)
        for source in (read_sources(data or others) if data or min_tokens else ())
    )
    return LongRows(every=every, sequence_length=sequence_length, batch_size=batch_size, sources=sources)


def read_sources(data: tuple[str, ...]) -> list[Source]:
    """`PATH[:PROPORTION]`, all with a proportion (they sum to 1) or none (equal shares)."""
    from koine.data import Source

    parts: list[tuple[str, float | None]] = []
    for text in data:
        path, colon, number = text.rpartition(":")
        if not colon or Path(text).exists():
            parts.append((text, None))
            continue
        try:
            parts.append((path, float(number)))
        except ValueError:
            raise UserError(
                f"'{number}' is no proportion", where=text, hint="write PATH:0.3, for example"
            ) from None
    given = [number for _, number in parts if number is not None]
    if given and len(given) != len(parts):
        raise UserError(
            "some --data have a proportion and some have none", hint="give it for all or for none"
        )
    folders = [Path(path).resolve() for path, _ in parts]
    for (path, _), folder in zip(parts, folders, strict=True):
        if folders.count(folder) > 1:
            total = sum(
                number or 0.0 for (_, number), other in zip(parts, folders, strict=True) if other == folder
            )
            raise UserError(
                "is given more than once",
                where=path,
                hint=f"give it once: {path}:{total:g}" if given else "give it once",
            )
    names = [Path(path).name for path, _ in parts]
    return [
        Source(
            name=name if names.count(name) == 1 else path,
            path=Path(path),
            proportion=number if number is not None else 1.0 / len(parts),
        )
        for name, (path, number) in zip(names, parts, strict=True)
    ]
