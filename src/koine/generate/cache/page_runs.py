"""Decode attention on CPU over runs of adjacent pages, each read in place by one call of the fused kernel.

Where a sequence has several runs, their results are merged by log-sum-exp
(`koine.generate.cache.split_attention`).

Shapes: r rows (sequences), k key heads, g query heads of a key head, s positions, d head size, p pages of a
slab, t positions of a page (`slab_2kptd`: keys and values).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from koine.generate.cache.paged_cache import CachedSequence, PagedCache
from koine.generate.cache.split_attention import (
    attend_chunks,
    matmuls_are_faster,
    merge_attention_states,
    partial_attention,
)

FEWEST_PAGES = 8
"""Mean length of a run below which whole slabs are faster, where there are many runs.

Each run is a call of the kernel of some 14 µs (docs/explanation/log.md).
"""
FEW_RUNS = 4
"""With at most so many runs in all, their length does not matter."""


class PageRun(NamedTuple):
    """Adjacent pages of one sequence.

    row: of the sequence. slab: where the pages are. first, pages: first page in the slab, and number of
        pages.
    start: position in the sequence of the first key.
    """

    row: int
    slab: int
    first: int
    pages: int
    start: int


def find_page_runs(cache: PagedCache, sequences: Sequence[CachedSequence]) -> list[PageRun]:
    """Return the pages of each sequence, in order, as runs."""
    runs: list[PageRun] = []
    for row, sequence in enumerate(sequences):
        for index, number in enumerate(sequence.pages):
            slab, place = cache.locate(number)
            last = runs[-1] if index else None
            if last is not None and last.slab == slab and place == last.first + last.pages:
                runs[-1] = last._replace(pages=last.pages + 1)
            else:
                runs.append(PageRun(row, slab, place, 1, index * cache.page))
    return runs


def runs_for_fused_kernel(cache: PagedCache, sequences: Sequence[CachedSequence]) -> list[PageRun]:
    """Return the runs where attending run by run is faster than slab by slab, else none.

    It is on CPU, with long runs, and where the kernel, which uses one thread a key head, leaves few threads
    idle.
    """
    if cache.device.type != "cpu" or torch.get_num_threads() > 2 * cache.config.kv_heads:
        return []
    pages = sum(len(sequence.pages) for sequence in sequences)
    # Every sequence has at least one run: often there is no need to find them.
    if len(sequences) > FEW_RUNS and pages < FEWEST_PAGES * len(sequences):
        return []
    runs = find_page_runs(cache, sequences)
    return runs if len(runs) <= FEW_RUNS or pages >= FEWEST_PAGES * len(runs) else []


def run_view(slab_2kptd: Tensor, run: PageRun) -> Tensor:
    """Return a view of a run's keys and values, `[2, 1, k, s, d]`."""
    pages_2kptd = slab_2kptd[:, :, run.first : run.first + run.pages]
    # A view, not `flatten`, which might copy: new keys are written through it.
    return pages_2kptd.view(2, 1, slab_2kptd.shape[1], -1, slab_2kptd.shape[4])


def attend_range(q_1kgd: Tensor, kv_21ksd: Tensor, length: int, softcap: float | None = None) -> Tensor:
    """Attend one query to the first `length` positions of keys and values, `[1, k, g, d]`."""
    if length < kv_21ksd.shape[3]:
        kv_21ksd = kv_21ksd.narrow(3, 0, length)
    if matmuls_are_faster(q_1kgd):
        return attend_chunks(q_1kgd[0], (kv_21ksd.squeeze(1),), softcap)[None]
    keys, values = kv_21ksd.unbind()
    return partial_attention(q_1kgd, keys, values, None, softcap)[0]


def attend_runs(
    q_rkgd: Tensor,
    runs: Sequence[PageRun],
    lengths: Sequence[int],
    slab: Callable[[int], Tensor],
    softcap: float | None = None,
) -> Tensor:
    """Attend each row's query (scaled) to the first `lengths[row] + 1` positions of its pages.

    slab: returns a slab's keys and values `[2, k, p, t, d]` by its number. Returns `[r, k, g, d]`.
    """
    visible: list[list[Tensor]] = [[] for _ in lengths]
    for run in runs:
        view_21ksd = run_view(slab(run.slab), run)
        visible[run.row].append(
            view_21ksd.narrow(3, 0, min(lengths[run.row] + 1 - run.start, view_21ksd.shape[3]))
        )
    if matmuls_are_faster(q_rkgd):
        out_rkgd = torch.empty_like(q_rkgd)
        for row, chunks in enumerate(visible):
            out_rkgd[row] = attend_chunks(q_rkgd[row], [chunk.squeeze(1) for chunk in chunks], softcap)
        return out_rkgd
    rows, outputs, sums = [], [], []
    for row, chunks in enumerate(visible):
        for keys_1ksd, values_1ksd in chunks:
            out, log_sum = partial_attention(q_rkgd[row : row + 1], keys_1ksd, values_1ksd, None, softcap)
            rows.append(row)
            outputs.append(out)
            sums.append(log_sum)
    out_ckgd = torch.cat(outputs)
    if len(rows) == len(lengths):
        return out_ckgd
    return merge_attention_states(out_ckgd, torch.cat(sums), torch.tensor(rows), len(lengths))
