"""Runs steps as processes of this machine."""

from __future__ import annotations

import os

from koine.plan.job import Job, Process


class LocalExecutor:
    """Each step is a process of its own; as many at once as cores and free memory allow."""

    def __init__(self, cores: int | None = None) -> None:
        import psutil

        if cores is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.cores = cores
        self.free_memory: int | None = psutil.virtual_memory().available

    def start(self, job: Job) -> Process:
        """Start a step."""
        return Process(job)
