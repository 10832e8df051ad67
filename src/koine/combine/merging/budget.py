"""Memory of a merge: an estimate before it runs, and a limit that its workers share.

Without the limit, many cores would hold many large tensors at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from koine.combine.merging.plan import MergePlan
from koine.hardware import available_memory

LIBRARY_BYTES = 300 * 2**20
"""Bytes of the process without any tensor."""

RETAINED_BYTES = 64 * 2**20
"""Bytes that glibc keeps of what a thread has freed: its threshold for trimming, at its largest."""

RATES = {
    "linear": 4e8,
    "slerp": 2e8,
    "task-arithmetic": 3e8,
    "ties": 6e7,
    "dare-linear": 8e7,
    "dare-ties": 6e7,
}
"""Entries of inputs merged per second, measured on two cores."""

DEFAULT_RATE = 1e8
"""The rate of methods that were not measured."""


@dataclass(frozen=True)
class MergeEstimate:
    """The memory, time and size of a merge."""

    peak_memory_bytes: int
    seconds: float
    output_bytes: int
    tensors: int


class ByteBudget:
    """A limit on the bytes that all workers hold together.

    A worker that needs more than the limit waits until no other holds any.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait until `count` bytes are free, and hold them while the context lasts."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= self.limit)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()


def memory_budget(plan: MergePlan, threads: int) -> int:
    """Return the bytes that the workers of a merge may hold together.

    Enough for the `threads` largest tensors, or what the machine has free where that is less. Never less than
    the largest tensor alone.
    """
    largest_first = sorted((job.working_bytes for job in plan.jobs.values()), reverse=True)
    return max(largest_first[0], min(sum(largest_first[:threads]), available_memory()))


def worker_count(plan: MergePlan, threads: int) -> int:
    """Return how many threads to start: those that find room in the budget with tensors of usual size.

    More would only wait, and the C library keeps `RETAINED_BYTES` of freed memory for each thread.
    """
    needs = [job.working_bytes for job in plan.jobs.values()]
    # Weighted by size: most of the time goes into large tensors, and a norm is soon done.
    usual = sum(one * one for one in needs) / max(1, sum(needs))
    return max(1, min(threads, int(memory_budget(plan, threads) // max(1.0, usual))))


def estimate_merge(plan: MergePlan, threads: int) -> MergeEstimate:
    """Estimate memory, time and output of a merge from its tensors and the measured rates."""
    jobs = list(plan.jobs.values())
    entries = sum(job.numel for job in jobs) * len(plan.models)
    modules = [estimate_merge(one, 1) for one in plan.modules.values()]
    return MergeEstimate(
        peak_memory_bytes=LIBRARY_BYTES
        + memory_budget(plan, threads)
        + RETAINED_BYTES * worker_count(plan, threads),
        seconds=2.0 + entries / RATES.get(plan.config.method, DEFAULT_RATE),
        output_bytes=sum(job.nbytes for job in jobs) + sum(one.output_bytes for one in modules),
        tensors=len(jobs) + sum(one.tensors for one in modules),
    )
