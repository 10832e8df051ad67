"""Choices of experts, sorted into rows: which are few, which are filled up, and which are taken together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from koine.model.moe import cpu_kernels as compiled_experts

PADDED: tuple[tuple[int, float], ...] = ((48, 1.5), (256, 1.2))
"""Up to so many tokens an expert, groups are filled up to the longest where that makes at most so many times as many rows: one batched matmul of many small
matrices is up to twice as fast as one each (docs/explanation/log.md). Beyond, it is worth 1.03."""

PADDED_BEYOND = 1.03

LARGE = 2**20
"""Entries of a matrix from which on its product is no longer held up by the call itself: groups are then not filled up (docs/explanation/log.md)."""

FEW = 32
"""Up to so many tokens an expert are few also for torch's products."""


class Groups(NamedTuple):
    """Choices sorted by expert, in rows.

    tokens: `[rows]`, the token of each row. place: `[tokens * k]`, the row of each choice. few: `[groups, 3]` int64, expert, first and last row (exclusive) of
    the groups of `koine.model.moe.cpu_kernels`; others: the same of all others that were chosen. each: rows an expert where all have as many, filled
    up with rows that are no choice: one batched product; 0 where each has as many as it was chosen. filling: those rows, whose tokens are read as zeros.
    """

    tokens: Tensor
    place: Tensor
    few: np.ndarray
    others: list[tuple[int, int, int]]
    each: int
    filling: Tensor


class Part(NamedTuple):
    """Rows that are taken through each operation together.

    rows: which of `Groups`. ends: `[(expert, first, last)]`, counted from the first of the rows; none where all experts have as many.
    """

    rows: slice
    ends: list[tuple[int, int, int]]


def parts_of(groups: Groups) -> list[Part]:
    """All but the few of `compiled_experts`: in one part where rows are few, which takes fewer calls; otherwise each expert from beginning to end, while what
    it works on is in the caches."""
    rows = len(groups.tokens)
    if groups.each:
        return [Part(slice(0, rows), [])]
    if groups.others and not len(groups.few) and rows <= FEW * len(groups.others):
        return [Part(slice(0, rows), groups.others)]
    return [Part(slice(start, end), [(expert, 0, end - start)]) for expert, start, end in groups.others]


def grouped(experts: Tensor, weight: Tensor, *, may_fill: bool, few: int) -> Groups:
    """Sorts the choices `experts` `[tokens, k]`.

    weight: one of the experts' matrices, `[experts, ...]`; may_fill: whether groups may be filled up; few: up to so many tokens an expert is of
    the few. IndexError where an expert was chosen that there is not.
    """
    # With numpy: it sorts numbers of 16 bits by counting them (24 µs for 8,192 choices, torch 240), and a call takes it a microsecond.
    flat = experts.reshape(-1).cpu().numpy()
    order = (flat.astype(np.uint16) if len(weight) <= 2**16 else flat).argsort(kind="stable")
    counts = np.bincount(flat, minlength=len(weight))
    if len(counts) > len(weight):
        raise IndexError(f"expert {len(counts) - 1} was chosen of {len(weight)}")
    row, tokens = np.arange(order.size), order // experts.shape[1]
    ends: list[tuple[int, int, int]] = []
    filling = np.empty(0, dtype=np.int64)
    each = _filled_up(counts.tolist(), weight[0].numel()) if may_fill else 0
    if each:
        row += np.repeat(np.arange(counts.size) * each - (counts.cumsum() - counts), counts)
        chosen, tokens = tokens, np.zeros(counts.size * each, dtype=np.int64)
        tokens[row] = chosen
        filling = np.setdiff1d(np.arange(len(tokens)), row, assume_unique=True)
    else:
        ends = list(_runs(counts.tolist()))
    of_few = [
        piece for expert, start, end in ends if end - start <= few for piece in _pieces(expert, start, end)
    ]
    place = np.empty_like(order)
    place[order] = row
    on = experts.device
    return Groups(
        torch.from_numpy(tokens).to(on),
        torch.from_numpy(place).to(on),
        np.array(of_few, dtype=np.int64).reshape(-1, 3),
        [(expert, start, end) for expert, start, end in ends if end - start > few],
        each,
        torch.from_numpy(filling).to(on),
    )


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, number in enumerate(counts):
        if number:
            yield expert, start, start + number
        start += number


def _pieces(expert: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Rows of one expert, in as many groups of `compiled_experts` as it takes, of nearly equal size and in full sixteens but for the last."""
    count = -(-(end - start) // compiled_experts.MOST_ROWS)
    size = -(-(end - start) // count // 16) * 16
    for first in range(start, end, size):
        yield expert, first, min(first + size, end)


def _filled_up(counts: list[int], entries: int) -> int:
    """The rows that each expert gets where it pays to give all as many, else 0; an expert that nobody chose gets none. entries: of its matrix."""
    total, largest = sum(counts), max(counts)
    if not total or not min(counts) or entries >= LARGE:
        return 0
    allowed = next((factor for most, factor in PADDED if total <= most * len(counts)), PADDED_BEYOND)
    return largest if largest * len(counts) <= allowed * total else 0
