"""Log to trackio: files on this machine, a Space or a server (`TRACKIO_SPACE_ID`, `TRACKIO_SERVER_URL`)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from koine.extras import import_extra
from koine.train.tracking.run_logger import Outcome, TrackedRun


class TrackioLogger:
    """A run of trackio, which finds runs again by their names: they end in a random suffix."""

    name = "trackio"

    def __init__(self, project: str) -> None:
        self.project = project
        self.trackio: Any = import_extra("trackio", extra="track", purpose="log a training to trackio")
        self.run: Any = None

    def start(self, run: TrackedRun) -> str:
        name = run.run_id or f"{run.name.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        self.run = self.trackio.init(
            project=self.project, name=name, resume="allow", config=dict(run.config), embed=False
        )
        return name

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.run.log(dict(figures), step=step)

    def finish(self, outcome: Outcome) -> None:
        self.run.finish()
