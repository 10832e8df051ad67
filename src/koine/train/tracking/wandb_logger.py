"""Log to Weights & Biases, online or offline (`WANDB_MODE`)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from koine.extras import import_extra
from koine.train.tracking.run_logger import Outcome, TrackedRun

EXIT_CODES: dict[Outcome, int] = {"finished": 0, "interrupted": 143, "failed": 1}


class WandbLogger:
    """A run of wandb; the name of the project is `WANDB_PROJECT` where that is set."""

    name = "wandb"

    def __init__(self, project: str) -> None:
        self.project = project
        self.wandb: Any = import_extra("wandb", extra="track", purpose="log a training to wandb")
        self.run: Any = None

    def start(self, run: TrackedRun) -> str:
        run_id = run.run_id or uuid.uuid4().hex[:8]
        # Its console capture would take over the terminal, and the progress bar with it.
        settings = self.wandb.Settings(console="off", silent=True)
        self.run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT") or self.project,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=run_id,
            resume="allow",
            config=dict(run.config),
            settings=settings,
        )
        return str(self.run.id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # wandb's steps only grow: those that come again after a restart are there already.
        if step >= self.run.step:
            self.run.log(dict(figures), step=step)

    def finish(self, outcome: Outcome) -> None:
        self.run.finish(exit_code=EXIT_CODES[outcome])
