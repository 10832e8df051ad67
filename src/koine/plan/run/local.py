"""Run steps as processes of this machine."""

from __future__ import annotations

from koine.hardware import available_memory, usable_cores
from koine.plan.run.job import Job, Process


class LocalExecutor:
    """Runs each step in a process of its own, as many at once as cores and free memory allow."""

    def __init__(self, cores: int | None = None) -> None:
        self.cores = usable_cores() if cores is None else cores
        self.free_memory: int | None = available_memory()

    def start(self, job: Job) -> Process:
        """Start the process of a step."""
        return Process(job)
