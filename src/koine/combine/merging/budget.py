"""What a merge needs, and a budget of bytes that its workers share: many cores must not hold many large tensors at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from koine.combine.merging.methods import BLOCK
from koine.combine.merging.plan import MergePlan
from koine.combine.safetensors_stream import NEAR_ROWS
from koine.hardware import available_memory

WHOLE_ENTRIES = 2**21
"""A tensor of at most so many entries is read whole where a method makes several passes over it; a larger one is read again in each."""

LIBRARIES = 300 * 2**20
"""Bytes of the process without any tensor."""

RETAINED = 64 * 2**20
"""Bytes that glibc keeps of what a thread has freed: its threshold for trimming, at its largest."""

RATES = {
    "linear": 4e8,
    "slerp": 2e8,
    "task-arithmetic": 3e8,
    "ties": 6e7,
    "dare-linear": 8e7,
    "dare-ties": 6e7,
}
"""Entries of inputs a second, as seen on two cores."""


@dataclass(frozen=True)
class MergeEstimate:
    """What a merge will take."""

    peak_memory_bytes: int
    seconds: float
    output_bytes: int
    tensors: int


class ByteBudget:
    """Bytes that may be held at once. A holder of more than all of them waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are free, and hold them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self.limit)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()


def working_bytes(plan: MergePlan, name: str) -> int:
    """Bytes that merging the tensor `name` holds at once."""
    entries = [one[name] for one in plan.inputs()]
    dtype, shape = plan.layout[name]
    numel = torch.Size(shape).numel()
    copies = len(entries)
    given = [plan.dtype_read(name, entry.dtype) for entry in entries]
    out = given[0].itemsize + (dtype.itemsize if dtype != given[0] else 0)
    # A method works in float32 (float64 stays): the differences of all models, masks of them, and their sum.
    wide = (2 * copies + 2) * max(4, given[0].itemsize)
    read = sum(
        entry.dtype.itemsize + (one.itemsize if one != entry.dtype else 0)
        for entry, one in zip(entries, given, strict=True)
    )
    if name in plan.vocabularies:
        # Rows are gathered from what was read, which may hold some that are not wanted.
        read *= 2 + NEAR_ROWS
    if plan.info.elementwise:
        return min(numel, max(BLOCK, entries[0].row)) * (read + out + wide)
    block, held = min(numel, BLOCK), numel if numel <= WHOLE_ENTRIES else min(numel, BLOCK)
    return numel * out + held * read + block * wide


def memory_budget(plan: MergePlan, threads: int) -> int:
    """Bytes that the workers of a merge may hold together: those of `threads` of the largest tensors, or what the machine has free where that is less; never
    less than the largest alone."""
    most = sorted((working_bytes(plan, name) for name in plan.layout), reverse=True)
    return max(most[0], min(sum(most[:threads]), available_memory()))


def worker_count(plan: MergePlan, threads: int) -> int:
    """How many of the threads have something to do: more than fit into the budget with a tensor of usual size each would only wait, and the C library keeps
    `RETAINED` of freed memory for each thread."""
    needs = [working_bytes(plan, name) for name in plan.layout]
    # Weighted by themselves: a norm is soon done, most of the time goes into the large ones.
    usual = sum(one * one for one in needs) / max(1, sum(needs))
    return max(1, min(threads, int(memory_budget(plan, threads) // max(1.0, usual))))


def estimate_merge(plan: MergePlan, threads: int) -> MergeEstimate:
    """What the merge will take, from the sizes of its tensors and rates seen on two cores."""
    sizes = {name: torch.Size(shape).numel() for name, (_, shape) in plan.layout.items()}
    entries = sum(sizes.values()) * len(plan.models)
    modules = [estimate_merge(one, 1) for one in plan.modules.values()]
    return MergeEstimate(
        LIBRARIES + memory_budget(plan, threads) + RETAINED * worker_count(plan, threads),
        2.0 + entries / RATES.get(plan.config.method, 1e8),
        sum(sizes[name] * dtype.itemsize for name, (dtype, _) in plan.layout.items())
        + sum(one.output_bytes for one in modules),
        len(plan.layout) + sum(one.tensors for one in modules),
    )
