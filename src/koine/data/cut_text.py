"""Count the text that rows cut off: documents, tokens, and chats that lose every completion token.

`no_split` and `one_per_row` truncate documents that are longer than a row; `concat` cuts nothing off.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from koine.data.components import Component
from koine.data.packing import NoSplitPacking
from koine.errors import KoineWarning, UserError

MOST_LOST_CHATS = 0.25
"""Largest share of chats that may lose every completion token.

Such a chat teaches nothing and takes the place of one that does. Some are outliers, of which a warning tells;
more than a quarter mean that the sequence length does not fit the data.
"""
CUT_FIGURES = "cut/"
"""Prefix of the figures in `metrics.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class CutText:
    """Counts of text that rows of one length cut off, over all documents that they are drawn from."""

    sequence_length: int
    documents: int
    tokens: int
    chats: int
    longest: int
    """Tokens of the longest document."""
    cut_documents: int
    """Documents that are longer than a row."""
    cut_tokens: int
    """Their tokens beyond the row."""
    lost_chats: int
    """Chats with completion tokens, all of them beyond the row."""

    def describe(self) -> str:
        """Return the counts as a sentence."""
        what = "chats" if self.chats == self.documents else "documents"
        text = (
            f"{_share(self.cut_documents, self.documents, what)} are longer than a sequence of "
            f"{self.sequence_length:,} tokens and lose their end: "
            f"{_share(self.cut_tokens, self.tokens, 'tokens')} are cut off"
        )
        if self.lost_chats:
            text += f"; {_share(self.lost_chats, self.chats, 'chats')} lose every completion token"
        return text

    def mend(self) -> str:
        """Return what cuts less."""
        return (
            f"raise --sequence-length (the longest has {self.longest:,} tokens), "
            "choose --packing concat, which cuts nothing off, or leave long ones out"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all counts."""
        return asdict(self)


def _share(part: int, total: int, what: str) -> str:
    """Return for example `3 of 60 documents (5.0 %)`."""
    percent = 100 * part / total
    shown = f"{percent:.1f}" if percent >= 0.1 or not part else "under 0.1"
    return f"{part:,} of {total:,} {what} ({shown} %)"


def count_cut_text(components: Iterable[Component]) -> tuple[CutText, ...]:
    """Count what rows cut off, for each length of row in which documents are truncated.

    components: one for each pool of documents that rows are drawn from.
    """
    found: dict[int, CutText] = {}
    for component in components:
        if not isinstance(component.packing, NoSplitPacking):
            continue
        one = _count(component, component.packing)
        before = found.get(one.sequence_length)
        found[one.sequence_length] = one if before is None else _sum(before, one)
    return tuple(found[length] for length in sorted(found))


def _count(component: Component, packing: NoSplitPacking) -> CutText:
    time, lengths = packing.sequence_length, packing.lengths
    cut = lengths > time
    chat = component.tokens.chat
    return CutText(
        sequence_length=time,
        documents=len(lengths),
        tokens=int(lengths.sum()),
        chats=len(lengths) if chat else 0,
        longest=int(lengths.max()),
        cut_documents=int(cut.sum()),
        cut_tokens=int((lengths[cut] - time).sum()),
        lost_chats=sum(_loses_completions(component, int(one), time) for one in packing.documents[cut])
        if chat
        else 0,
    )


def _loses_completions(component: Component, document: int, time: int) -> bool:
    """Return whether a chat has completion tokens, and none of them is a target in a row of `time` tokens."""
    mask = component.tokens.mask(document)
    # The first token is no target: nothing comes before it.
    return bool(mask[time:].any()) and not bool(mask[1:time].any())


def _sum(one: CutText, other: CutText) -> CutText:
    """Add the counts of two pools of documents in rows of one length."""
    names = ("documents", "tokens", "chats", "cut_documents", "cut_tokens", "lost_chats")
    sums = {name: getattr(one, name) + getattr(other, name) for name in names}
    return replace(one, longest=max(one.longest, other.longest), **sums)


def warn_of_cut_text(counts: Sequence[CutText]) -> None:
    """Warn of text that is cut off, one line for each length of row."""
    for one in counts:
        if one.cut_documents:
            warnings.warn(f"{one.describe()}; {one.mend()}", KoineWarning, stacklevel=3)


def check_chats_keep_completions(counts: Sequence[CutText]) -> None:
    """Raise `UserError` where more than `MOST_LOST_CHATS` of the chats lose every completion token."""
    for one in counts:
        if one.lost_chats > MOST_LOST_CHATS * one.chats:
            raise UserError(
                f"{_share(one.lost_chats, one.chats, 'chats')} lose every completion token in sequences of "
                f"{one.sequence_length:,} tokens; at most {100 * MOST_LOST_CHATS:.0f} % may",
                hint=one.mend(),
            )


def cut_figures(counts: Sequence[CutText]) -> dict[str, float]:
    """Return the shares that are cut off over all lengths of row, for the metrics; none where nothing is."""
    if not any(one.cut_documents for one in counts):
        return {}
    figures = {
        "documents": sum(one.cut_documents for one in counts) / sum(one.documents for one in counts),
        "tokens": sum(one.cut_tokens for one in counts) / sum(one.tokens for one in counts),
    }
    chats = sum(one.chats for one in counts)
    if chats:
        figures["chats_without_completion"] = sum(one.lost_chats for one in counts) / chats
    return {CUT_FIGURES + name: value for name, value in figures.items()}
