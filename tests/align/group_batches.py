"""Batches of groups of random tokens, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from koine.data.groups import Group, GroupBatch, Segment
from koine.data.packing import DocumentSlice
from koine.data.preference_order import build_groups


def pair(prompt: int, chosen: int, rejected: int) -> list[Segment]:
    """A prompt with two answers, of these lengths."""
    return [Segment(-1, prompt, False), Segment(0, chosen, True), Segment(0, rejected, True)]


def revised(prompt: int, chosen: int, rejected: int, turn: int) -> list[Segment]:
    """SRPO's group of six completions."""
    after = [
        segment
        for parent, place in ((1, 3), (2, 6))
        for segment in (
            Segment(parent, turn, False), Segment(place, chosen, True), Segment(place, rejected, True)
        )
    ]  # fmt: skip
    return [*pair(prompt, chosen, rejected), *after]


@dataclass(frozen=True)
class RandomSource:
    """What `build_groups` reads of a token source: random tokens in trees of segments."""

    trees: Sequence[list[Segment]]
    vocabulary: int

    def segments(self, document: int) -> list[Segment]:
        return self.trees[document]

    def tokens(self, document: int, start: int, end: int) -> NDArray[Any]:
        length = sum(one.length for one in self.trees[document])
        return np.random.default_rng(document).integers(3, self.vocabulary, length)[start:end]

    def mask(self, document: int, start: int, end: int) -> NDArray[Any]:
        """All tokens of a completion count but its last one, where it has more than three."""
        mask: list[int] = []
        for one in self.trees[document]:
            counts = [int(one.completion)] * one.length
            if one.length > 3:
                counts[-1] = 0
            mask += counts
        return np.array(mask)[start:end]

    def group(self, document: int, source: str) -> Group:
        return Group(f"g{document}", "en", source, document, "preferences")


def batch_of(rows: Sequence[Sequence[list[Segment]]], time: int, vocabulary: int) -> GroupBatch:
    """Return a batch with these trees in its rows."""
    source: Any = RandomSource([tree for row in rows for tree in row], vocabulary)
    numbers = iter(range(len(source.trees)))
    content = [
        [(source, "s", DocumentSlice(next(numbers), 0, sum(one.length for one in tree))) for tree in row]
        for row in rows
    ]
    return build_groups(content, time, list)


def mixed_batch(vocabulary: int) -> GroupBatch:
    """Two rows: pairs beside each other, a group with revisions, prompts shorter and longer than a window."""
    rows = [[pair(13, 7, 3), pair(2, 1, 5)], [revised(4, 3, 6, 3)]]
    return batch_of(rows, 40, vocabulary)


def conversations(batch: GroupBatch) -> list[tuple[list[int], list[int]]]:
    """Return of each completion the whole conversation's ids, and the positions of the tokens that count."""
    found: list[tuple[list[int], list[int]]] = [([], [])] * batch.completions
    positions = batch.positions.flatten()[batch.predicted_at]
    for segment in batch.segments:
        if segment.completion < 0:
            continue
        ids: list[int] = []
        one, parent = segment, segment.parent
        while True:
            ids = batch.tokens[one.row, one.start : one.start + one.length].tolist() + ids
            if parent < 0:
                break
            one, parent = batch.segments[parent], batch.segments[parent].parent
        own = positions[batch.completion_of == segment.completion]
        found[segment.completion] = (ids, own.tolist())
    return found


def weights_of(count: int) -> torch.Tensor:
    """Return different weights of completions, so that no gradient cancels."""
    return torch.linspace(-1.0, 1.5, count)
