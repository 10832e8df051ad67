"""Mismatched groups: each prompt of a source with the completion of another of its records.

KTO estimates from them how far the policy is from its reference (`koine.align.losses.kto_reference_point`). The
other record is drawn once for the whole source, so that neither the batch nor the order of records decides it,
and the reference's log-probabilities can be computed once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.data.groups import Group, Segment
from koine.data.shards import TokenSource
from koine.errors import UserError

_SEED = 0x4B544F


class MismatchedSource:
    """The groups of a source of labelled completions, read like a `TokenSource`, with completions exchanged.

    The completions go round in one cycle through all records, in random order. Labels stay those of the prompt's
    record.

    Raises `UserError` for a source of one record.
    """

    def __init__(self, source: TokenSource) -> None:
        if len(source) < 2:
            raise UserError(
                "has one record, and KTO needs completions of other records",
                where=source.path,
                hint="give at least 2 records",
            )
        self.source = source
        order = np.random.Generator(np.random.Philox(_SEED)).permutation(len(source))
        self.partner: NDArray[np.int64] = np.empty(len(source), dtype=np.int64)
        """The record whose completion follows the prompt of each record."""
        self.partner[order] = np.roll(order, -1)
        lengths = np.array([self._prompt(number).length for number in range(len(source))])
        self.prompts: NDArray[np.int64] = lengths
        """Tokens of each record's prompt."""
        self.lengths: NDArray[np.int64] = lengths + (source.lengths - lengths)[self.partner]
        """Tokens of each group."""

    def __len__(self) -> int:
        return len(self.source)

    def _prompt(self, document: int) -> Segment:
        prompt, completion = self.source.segments(document)
        assert not prompt.completion
        assert completion.completion
        return prompt

    def segments(self, document: int) -> list[Segment]:
        """Return the prompt and the other record's completion."""
        length = int(self.prompts[document])
        return [Segment(-1, length, False), Segment(0, int(self.lengths[document]) - length, True)]

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Return ids `[start, end)` of a group."""
        return self._slice(self.source.tokens, document, start, end)

    def mask(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Return 1 for the tokens `[start, end)` that count."""
        return self._slice(self.source.mask, document, start, end)

    def _slice(self, read: Any, document: int, start: int, end: int | None) -> NDArray[Any]:
        other, own = int(self.partner[document]), int(self.prompts[document])
        whole = np.concatenate([read(document, 0, own), read(other, int(self.prompts[other]))])
        return whole[start:end]

    def group(self, document: int, source: str) -> Group:
        """Return the description of the prompt's record."""
        return self.source.group(document, source)
