"""Components of a mixture: one language of one source, with its weight and packing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.data.groups import fewest_tokens
from koine.data.mixture import Mixture, Packing, Source
from koine.data.packing import ConcatPacking, NoSplitPacking, OnePerRowPacking
from koine.data.shards import TokenSource
from koine.errors import KoineWarning, UserError, did_you_mean

PACKINGS: dict[Packing, type[ConcatPacking | NoSplitPacking]] = {
    "concat": ConcatPacking,
    "no_split": NoSplitPacking,
    "one_per_row": OnePerRowPacking,
}

MOST_LOST_GROUPS = 0.25
"""Largest share of groups that may be left out because their prompt fills a row."""
DocumentPool = tuple[str, str, int, int]
"""Folder, language, tokens of a row, fewest tokens of a document: rows with equal keys share one order."""
Packings = dict[DocumentPool, ConcatPacking | NoSplitPacking]


@dataclass(frozen=True)
class Component:
    """One language of one source, in one phase."""

    source: Source
    tokens: TokenSource
    language: str
    weight: float
    packing: ConcatPacking | NoSplitPacking

    @property
    def key(self) -> tuple[str, str]:
        """Key that is equal for components of different phases with the same documents."""
        return str(self.source.path), self.language


def components_of(
    source: Source, tokens: TokenSource, mixture: Mixture, sequence_length: int, packings: Packings
) -> Iterator[Component]:
    """Yield the components of a source in a phase, in rows of `sequence_length` tokens.

    Packings are shared through `packings`. Raises `UserError` if the source has no documents to draw.
    """
    least = source.min_tokens or 0
    enough = tokens.lengths >= least
    if tokens.kind != "documents":
        enough &= drawable_groups(tokens, sequence_length)
    present = np.unique(tokens.languages[enough]).tolist()
    totals = {code: int(tokens.lengths[enough & (tokens.languages == code)].sum()) for code in present}
    if not tokens.lengths.sum():
        raise UserError("holds no tokens", where=source.path, hint="tokenize a source that has documents")
    if not sum(totals.values()):
        raise UserError(
            f"holds no document of {least} tokens, the longest has {tokens.lengths.max()}",
            where=source.path,
            hint="lower min_tokens, or give longer text",
        )
    weights = _language_weights(source, totals)
    scale = source.proportion / sum(weights.values())
    for code, weight in sorted(weights.items()):
        key = (str(source.path), code, sequence_length, least)
        if key not in packings:
            documents = np.flatnonzero(enough & (tokens.languages == code))
            kind = PACKINGS[mixture.packing]
            # Rows of each length have their own shuffle of the documents.
            own = () if sequence_length == mixture.sequence_length and not least else (sequence_length, least)
            seed = (mixture.seed, _stable_hash(code), *own)
            packings[key] = kind(documents, tokens.lengths, sequence_length, seed)
        yield Component(source, tokens, code, weight * scale, packings[key])


def drawable_groups(source: TokenSource, sequence_length: int) -> NDArray[Any]:
    """Return whether each group fits a row once its completions are cut (`fewest_tokens`), `[documents]`.

    Raises `UserError` where more than a quarter of the groups have none; a few others are left out.
    """
    least = np.array([fewest_tokens(source.segments(number)) for number in range(len(source))])
    fits = least <= sequence_length
    missing = len(fits) - int(fits.sum())
    if missing > MOST_LOST_GROUPS * len(fits):
        raise UserError(
            f"{missing:,} of {len(fits):,} groups have no room for their completions in a row of "
            f"{sequence_length:,} tokens",
            where=source.path,
            hint=f"raise --sequence-length (the longest needs {least.max():,} tokens)",
        )
    cut = int((source.lengths[fits] > sequence_length).sum())
    if missing or cut:
        warnings.warn(
            f"{source.path}: of {len(fits):,} groups {cut:,} are longer than a row of {sequence_length:,} tokens, "
            f"and their completions are cut; {missing:,} do not fit even so, and are left out; "
            f"the longest has {source.lengths.max():,} tokens",
            KoineWarning,
            stacklevel=4,
        )
    return fits


def _language_weights(source: Source, totals: Mapping[str, int]) -> dict[str, float]:
    """Return the weights of a source's languages, from the tokens of each."""
    if source.languages is None:
        power = 1.0 / (source.temperature or 1.0)
        # A power above 1 may overflow floats, so it is applied to shares of the largest.
        unit = max(totals.values()) if power > 1.0 else 1
        return {code: (total / unit) ** power for code, total in totals.items()}
    least = source.min_tokens or 0
    for code in source.languages:
        if code not in totals:
            raise UserError(
                f"holds no document in '{code}'" + (f" of {least} tokens" if least else ""),
                where=source.path,
                hint=did_you_mean(code, totals),
            )
    return dict(source.languages)


def check_no_overlap(phase: str, components: list[Component]) -> None:
    """Raise `UserError` if two sources of a phase draw the same rows."""
    seen: dict[tuple[str, str], str] = {}
    for component in components:
        other = seen.setdefault(component.key, component.source.name)
        if other != component.source.name:
            raise UserError(
                f"the sources '{other}' and '{component.source.name}' both draw '{component.language}' "
                f"from {component.source.path}",
                where=f"phase '{phase}'",
                hint="give each language of a folder to one of them",
            )


def apportion(weights: NDArray[Any], total: int) -> NDArray[Any]:
    """Return integers at least 1 that sum to `total`, in proportion to `weights` (largest remainder)."""
    if len(weights) > total:
        raise UserError(f"{len(weights)} languages in one mixture", hint=f"at most {total} are possible")
    exact = weights / weights.sum() * (total - len(weights))
    counts = np.floor(exact).astype(np.int64)
    missing = total - len(weights) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    out: NDArray[Any] = counts + 1
    return out


def _stable_hash(text: str) -> int:
    """Return a number that depends only on the text (Python's own hash changes between processes)."""
    return int.from_bytes(text.encode("utf-8")[:8].ljust(8, b"\0"), "big")
