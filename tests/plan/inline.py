"""Steps of a plan in the process of the tests, for plans of many small steps.

A process for each step would import torch each time, which takes longer than the step. What processes are for
(locks, kills, logs, memory) is tested in tests/plan/run, and by the quick start.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import pytest

from koine.plan.run.job import Job
from koine.plan.run.worker import build


class Done:
    """A step that has ended successfully."""

    def poll(self) -> int | None:
        return 0

    def stop(self, number: int) -> None: ...

    def kill(self) -> None: ...


class InlineExecutor:
    """Runs each step where it is started, one after the other. An error of a step is raised at once."""

    cores = 1
    free_memory: int | None = None

    def start(self, job: Job) -> Done:
        log = Path(job.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        with (
            log.open("a") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            build(job)
        return Done()


def run_steps_inline(patch: pytest.MonkeyPatch) -> None:
    """Let `koine run` in this process run its steps here."""
    patch.setattr("koine.plan.run.local.LocalExecutor", InlineExecutor)
