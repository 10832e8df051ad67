"""The real trackers in their offline modes: a run, its restart, and what they have stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.train.tracking.mlflow_logger import flat
from koine.train.tracking.run_logger import RunLogger, TrackedRun, open_run_logger

CONFIG = {"settings": {"learning_rate": 0.01}, "layers": [{"window": 8}], "koine": "0"}


def log(tracker: str, run_id: str | None, steps: range) -> str:
    """Log some steps in one start of a run; return its id."""
    logger: RunLogger = open_run_logger(tracker, "a-project")
    found = logger.start(TrackedRun(name="a/b", config=CONFIG, run_id=run_id))
    for step in steps:
        logger.log(step, {"loss": 1.0 / (step + 1), "evaluation/bits_per_byte/domain/web": 2.0})
    logger.finish("finished" if run_id else "interrupted")
    return found


@pytest.mark.parametrize("store", ["sqlite:///runs.db", "file"])
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri() if store == "file" else store)
    first = log("mlflow", None, range(3))
    client = mlflow.MlflowClient()
    assert client.get_run(first).info.status == "KILLED"
    # Step 2 comes again: the training went on from an earlier checkpoint.
    assert log("mlflow", first, range(1, 5)) == first
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a/b"
    assert run.data.params["settings.learning_rate"] == "0.01"
    steps = [one.step for one in client.get_metric_history(first, "loss")]
    assert sorted(set(steps)) == [0, 1, 2, 3, 4]
    assert len(steps) <= 6
    assert run.data.metrics["evaluation/bits_per_byte/domain/web"] == 2.0


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    import os
    import subprocess
    import sys

    # Its folder is read from the environment when it is imported.
    code = (
        "from tests.train.tracking.test_loggers import log\n"
        "run = log('trackio', None, range(3))\n"
        "assert log('trackio', run, range(3, 5)) == run\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "lines = SQLiteStorage.get_logs('a-project', run)\n"
        "assert [one['step'] for one in lines if 'loss' in one] == [0, 1, 2, 3, 4], lines\n"
        "assert SQLiteStorage.get_runs('a-project') == [run]\n"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = log("wandb", None, range(3))
    assert log("wandb", run, range(3, 5)) == run
    # One file for each start, which `wandb sync` joins by the id.
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run}.wandb"] * 2
    content = [file.read_bytes() for file in files]
    assert all(b"evaluation/bits_per_byte/domain/web" in one for one in content)
    assert b"learning_rate" in content[0]


def test_nested_configuration_has_dotted_names() -> None:
    assert dict(flat("", CONFIG)) == {
        "settings.learning_rate": "0.01",
        "layers": '[{"window": 8}]',
        "koine": "0",
    }
