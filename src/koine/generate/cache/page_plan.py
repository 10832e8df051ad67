"""Plan of a decode step over pages: which pages of each slab are read, and by which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from koine.generate.cache.paged_cache import SPARSE, CachedSequence, PagedCache

UNUSED_POSITION = 2**40
"""First position of a page that no row uses: later than any query."""


class PageGroup(NamedTuple):
    """Pages of one slab that are read together: a range (read in place), or page indices (gathered)."""

    slab: int
    pages: slice | Tensor


@dataclass(frozen=True)
class PagePlan:
    """Pages to read, and the rows that use them.

    groups: pages by slab. sizes: number of pages in each group.
    rows: `[pages]` of all groups in order, the row that uses each page.
    first: `[pages]`, position of each page's first key in its sequence; `UNUSED_POSITION` for a page of a
        range that no row uses.
    """

    groups: Sequence[PageGroup]
    sizes: Sequence[int]
    rows: Tensor
    first: Tensor


def build_page_plan(cache: PagedCache, sequences: Sequence[CachedSequence]) -> PagePlan:
    """Return the pages of all sequences by slab.

    A page that several sequences share is in one group for each.
    """
    uses: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    users: dict[int, int] = {}
    for row, sequence in enumerate(sequences):
        for index, number in enumerate(sequence.pages):
            user = users.get(number, 0)
            users[number] = user + 1
            # Grouped by slab and by n-th user of a page: within one group a page is read once.
            slab, place = cache.locate(number)
            uses.setdefault((slab, user), []).append((place, row, index * cache.page))
    groups, sizes = [], []
    rows: list[int] = []
    starts: list[int] = []
    for (slab, _), pages in sorted(uses.items()):
        pages.sort()
        first, last = pages[0][0], pages[-1][0] + 1
        if len(pages) >= SPARSE * (last - first):
            begin, count = len(rows), last - first
            rows += [0] * count
            starts += [UNUSED_POSITION] * count
            for page, row, start in pages:
                rows[begin + page - first], starts[begin + page - first] = row, start
            groups.append(PageGroup(slab, slice(first, last)))
        else:
            count = len(pages)
            rows += [row for _, row, _ in pages]
            starts += [start for _, _, start in pages]
            numbers = torch.tensor([page for page, _, _ in pages], device=cache.device)
            groups.append(PageGroup(slab, numbers))
        sizes.append(count)
    return PagePlan(
        groups,
        sizes,
        torch.tensor(rows, device=cache.device),
        torch.tensor(starts, device=cache.device),
    )
