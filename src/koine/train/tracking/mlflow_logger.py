"""Log to MLflow: a database, a folder or a server (`MLFLOW_TRACKING_URI`)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from koine.extras import import_extra
from koine.train.tracking.run_logger import Outcome, TrackedRun

MAX_VALUE = 500  # characters of a parameter that every store of MLflow takes
PARAMETERS_PER_CALL = 100
STATES: dict[Outcome, str] = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MlflowLogger:
    """A run of MLflow; the name of the experiment is `MLFLOW_EXPERIMENT_NAME` where that is set."""

    name = "mlflow"

    def __init__(self, project: str) -> None:
        self.project = project
        purpose = "log a training to MLflow"
        self.mlflow: Any = import_extra("mlflow", extra="track", purpose=purpose)
        self.entities: Any = import_extra("mlflow.entities", extra="track", purpose=purpose)
        self.client: Any = None
        self.run_id = ""
        self.last_step = -1

    def start(self, run: TrackedRun) -> str:
        self.client = self.mlflow.MlflowClient()
        if run.run_id is not None:
            self.client.update_run(run.run_id, status="RUNNING")
            history = self.client.get_metric_history(run.run_id, "loss")
            self.run_id, self.last_step = run.run_id, max((one.step for one in history), default=-1)
            return self.run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.project
        experiment = self.client.get_experiment_by_name(name)
        where = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        self.run_id = str(self.client.create_run(where, run_name=run.name).info.run_id)
        parameters = [self.entities.Param(key, value[:MAX_VALUE]) for key, value in flat("", run.config)]
        for start in range(0, len(parameters), PARAMETERS_PER_CALL):
            self.client.log_batch(self.run_id, params=parameters[start : start + PARAMETERS_PER_CALL])
        return self.run_id

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        # Points that come again after a restart would be drawn twice.
        if step < self.last_step:
            return
        now = int(time.time() * 1000)
        metrics = [self.entities.Metric(name, value, now, step) for name, value in figures.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self, outcome: Outcome) -> None:
        self.client.set_terminated(self.run_id, STATES[outcome])


def flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested objects as names with dots and text; lists are leaves."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)
