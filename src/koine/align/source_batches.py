"""Batches of all groups of a token source, in its order, for computations that are no training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from koine.data.groups import GroupBatch
from koine.data.mismatched import MismatchedSource
from koine.data.packing import DocumentSlice
from koine.data.preference_order import build_groups
from koine.data.shards import TokenSource


class SourceBatch(NamedTuple):
    """A batch, and the numbers of its groups in the source."""

    batch: GroupBatch
    numbers: list[int]


def source_batches(
    tokens: TokenSource | MismatchedSource, name: str, numbers: Iterable[int], *, time: int, rows: int
) -> Iterator[SourceBatch]:
    """Yield batches of whole groups, packed in order; a group longer than a row is alone in it, and is cut.

    Args:
        tokens: the source.
        name: of the source, for `Group.source`.
        numbers: of groups that fit a row once their completions are cut (`koine.data.groups.fewest_tokens`).
        time: tokens of a row.
        rows: rows of a batch at most.
    """
    packed: list[list[int]] = []
    for row in _packed_rows(tokens, numbers, time):
        packed.append(row)
        if len(packed) == rows:
            yield _batch(tokens, name, packed, time)
            packed = []
    if packed:
        yield _batch(tokens, name, packed, time)


def _batch(
    tokens: TokenSource | MismatchedSource, name: str, rows: list[list[int]], time: int
) -> SourceBatch:
    content = [
        [(tokens, name, DocumentSlice(number, 0, int(tokens.lengths[number]))) for number in row]
        for row in rows
    ]
    return SourceBatch(build_groups(content, time, list), [number for row in rows for number in row])


def _packed_rows(
    tokens: TokenSource | MismatchedSource, numbers: Iterable[int], time: int
) -> Iterator[list[int]]:
    row: list[int] = []
    used = 0
    for number in numbers:
        length = min(int(tokens.lengths[number]), time)
        if row and used + length > time:
            yield row
            row, used = [], 0
        row.append(number)
        used += length
    if row:
        yield row
