"""The interface of an experiment tracker, and which ones there are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from koine.errors import UserError, did_you_mean

TRACKERS = ("wandb", "trackio", "mlflow")
TRACK, TRACK_PROJECT = "KOINE_TRACK", "KOINE_TRACK_PROJECT"
"""Environment variables: the tracker and the project of every training, also those inside `koine run`."""
PROJECT = "koine"

Outcome = Literal["finished", "interrupted", "failed"]
"""How a training ended; an interrupted one may go on later."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """The run that a logger opens.

    Attributes:
        name: Its name for people.
        config: Settings, data and model as JSON values.
        run_id: The id that `RunLogger.start` returned before the restart; None: a new run.
    """

    name: str
    config: Mapping[str, Any]
    run_id: str | None = None


class RunLogger(Protocol):
    """An experiment tracker. All its methods are called in one thread that is not the training's.

    They may raise anything and take any time: the training goes on (see `koine.train.tracking.background`).
    """

    @property
    def name(self) -> str:
        """The tracker's name, for messages and for finding its run again."""

    def start(self, run: TrackedRun) -> str:
        """Open a new run, or that of `run.run_id` again; return its id."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a step. After a restart, steps that were logged before may come again."""

    def finish(self, outcome: Outcome) -> None:
        """Close the run."""


def open_run_logger(tracker: str, project: str = PROJECT) -> RunLogger:
    """Return the logger of a tracker: `wandb`, `trackio` or `mlflow`.

    Where it writes is the tracker's own setting: `WANDB_MODE`, `TRACKIO_SPACE_ID`, `MLFLOW_TRACKING_URI`, ...

    Args:
        tracker: one of `TRACKERS`.
        project: the project (MLflow: the experiment) that the run belongs to.

    Raises:
        UserError: an unknown tracker, or its package is missing.
    """
    if tracker == "wandb":
        from koine.train.tracking.wandb_logger import WandbLogger

        return WandbLogger(project)
    if tracker == "trackio":
        from koine.train.tracking.trackio_logger import TrackioLogger

        return TrackioLogger(project)
    if tracker == "mlflow":
        from koine.train.tracking.mlflow_logger import MlflowLogger

        return MlflowLogger(project)
    raise UserError(f"unknown tracker '{tracker}'", where="--track", hint=did_you_mean(tracker, TRACKERS))


def logger_from_environment() -> RunLogger | None:
    """Return the logger that `KOINE_TRACK` and `KOINE_TRACK_PROJECT` name; None where they name none."""
    tracker = os.environ.get(TRACK, "")
    return open_run_logger(tracker, os.environ.get(TRACK_PROJECT) or PROJECT) if tracker else None
