"""Attention of new tokens to pages that lie one after another, on CPU: a run of pages is one stretch of keys, read where it lies by the fused kernel.

Where a sequence has several runs, their results meet by the sums of their exponentials, which the kernel gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koine.generate.cache.paged_cache import CachedSequence, PagedCache
from koine.generate.cache.split_attention import merge_attention_states, partial_attention

FEWEST_PAGES = 8
"""Pages that a run must have in the mean, where there are many: each is a call of the kernel of some 14 µs, and many short ones are faster a slab at a
time (docs/explanation/log.md)."""
FEW_RUNS = 4
"""Up to so many runs in all, their length does not matter."""


class Run(NamedTuple):
    """`pages` pages from `first` on of a slab, whose first key is at position `start` of the sequence of `row`."""

    row: int
    slab: int
    first: int
    pages: int
    start: int


def page_runs(cache: PagedCache, sequences: Sequence[CachedSequence]) -> list[Run]:
    """The pages of each sequence, in order, as runs."""
    runs: list[Run] = []
    for row, sequence in enumerate(sequences):
        for index, number in enumerate(sequence.pages):
            slab, place = cache.place_of(number)
            last = runs[-1] if index else None
            if last is not None and last.slab == slab and place == last.first + last.pages:
                runs[-1] = last._replace(pages=last.pages + 1)
            else:
                runs.append(Run(row, slab, place, 1, index * cache.page))
    return runs


def runs_worth_reading(cache: PagedCache, sequences: Sequence[CachedSequence]) -> list[Run]:
    """The runs, where reading them is faster than reading slabs, and none otherwise: on CPU, where the pages lie together and the kernel, which works on one
    key head a thread, leaves few threads idle."""
    if cache.device.type != "cpu" or torch.get_num_threads() > 2 * cache.config.kv_heads:
        return []
    pages = sum(len(sequence.pages) for sequence in sequences)
    # Every sequence has a run at least: often there is no need to find them.
    if len(sequences) > FEW_RUNS and pages < FEWEST_PAGES * len(sequences):
        return []
    runs = page_runs(cache, sequences)
    return runs if len(runs) <= FEW_RUNS or pages >= FEWEST_PAGES * len(runs) else []


def run_of(slab: Tensor, run: Run) -> Tensor:
    """Keys and values of a run, `[2, 1, kv_heads, positions, head_dim]`, where they lie in a slab `[2, kv_heads, pages, page, head_dim]`."""
    pages = slab[:, :, run.first : run.first + run.pages]
    # A view, not `flatten`, which might copy: new keys are written through it.
    return pages.view(2, 1, slab.shape[1], -1, slab.shape[4])


def attend_held(q: Tensor, held: Tensor, seen: int) -> tuple[Tensor, Tensor]:
    """`partial_attention` of one position, q `[1, kv_heads, groups, head_dim]`, to the first `seen` of `held` `[2, 1, kv_heads, positions, head_dim]`."""
    if seen < held.shape[3]:
        held = held.narrow(3, 0, seen)
    keys, values = held.unbind()
    return partial_attention(q, keys, values, None)


def attend_runs(
    q: Tensor, runs: Sequence[Run], lengths: Sequence[int], slab: Callable[[int], Tensor]
) -> Tensor:
    """Attention of each row to the first `lengths[row] + 1` positions of its pages.

    q and the result: `[rows, kv_heads, groups, head_dim]`, scaled. slab: keys and values `[2, kv_heads, pages, page, head_dim]` by number.
    """
    rows, parts, sums = [], [], []
    for run in runs:
        seen = lengths[run.row] + 1 - run.start
        part, log_sum = attend_held(q[run.row : run.row + 1], run_of(slab(run.slab), run), seen)
        rows.append(run.row)
        parts.append(part)
        sums.append(log_sum)
    mixed = torch.cat(parts)
    if len(runs) == q.shape[0]:
        return mixed
    return merge_attention_states(mixed, torch.cat(sums), torch.tensor(rows), q.shape[0])
