"""A tracker beside a training: what it gets, how it resumes, and that its failures are not the training's."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from koine.errors import KoineWarning, UserError
from koine.train.tracking import background
from koine.train.tracking.run_logger import Outcome, TrackedRun, logger_from_environment, open_run_logger

from ..fakes import fake_order
from ..test_loop import run


class FakeLogger:
    """Keeps what it gets; fails or hangs where it is told to."""

    name = "fake"

    def __init__(self, *, start: str = "", fail_at: int | None = None, hang_at: int | None = None) -> None:
        self.start_error, self.fail_at, self.hang_at = start, fail_at, hang_at
        self.runs: list[TrackedRun] = []
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.outcome: Outcome | None = None
        self.threads: set[int] = set()
        self.released = threading.Event()

    def start(self, run: TrackedRun) -> str:
        if self.start_error:
            raise ConnectionError(self.start_error)
        self.runs.append(run)
        return run.run_id or "new"

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.threads.add(threading.get_ident())
        if step == self.fail_at:
            raise OSError("the disk of the tracker is full")
        if step == self.hang_at:
            self.released.wait()
        self.lines.append((step, dict(figures)))

    def finish(self, outcome: Outcome) -> None:
        self.outcome = outcome

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.lines]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "tracking.json").read_text()))


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def interrupt_after(done: int) -> Any:
    """Evaluate every step; press Ctrl-C after this one."""

    def evaluate(model: Any, steps_done: int) -> dict[str, float]:
        if steps_done == done:
            signal.raise_signal(signal.SIGINT)
        return {"score": 1.0 / steps_done}

    return evaluate


def settings(**fields: Any) -> Any:
    from dataclasses import replace

    from ..test_loop import BASE

    return replace(BASE, **fields)


def test_it_gets_configuration_and_figures_and_changes_nothing(tmp_path: Path) -> None:
    order = fake_order(tmp_path / "s", steps=(4,))
    logger = FakeLogger()
    run(tmp_path / "a", order, logger=logger)
    run(tmp_path / "b", order)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    identity = [json.loads((tmp_path / name / "training.json").read_text())["identity"] for name in "ab"]
    assert identity[0] == identity[1]
    assert [{"step": step, **figures} for step, figures in logger.lines] == metrics(tmp_path / "a")
    [start] = logger.runs
    assert (start.name, start.run_id) == ("a", None)
    assert start.config["settings"]["learning_rate"] == 1e-2
    assert json.loads(json.dumps(start.config)) == start.config
    assert logger.outcome == "finished"
    assert logger.threads != {threading.get_ident()}, "the training does not wait for a tracker"
    assert record(tmp_path / "a") == {"tracker": "fake", "run": "new", "next_step": 4}


def test_a_restart_goes_on_in_the_same_run(tmp_path: Path) -> None:
    order, out = fake_order(tmp_path / "s", steps=(6,)), tmp_path / "a"
    first, second = FakeLogger(), FakeLogger()
    with pytest.raises(SystemExit):
        run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(3), logger=first)
    assert first.outcome == "interrupted"
    assert set(first.steps) == {0, 1, 2}
    run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(0), logger=second)
    assert [one.run_id for one in second.runs] == ["new"]
    assert set(second.steps) == {3, 4, 5}
    assert [{"step": step, **figures} for step, figures in first.lines + second.lines] == metrics(out)


def test_a_tracker_that_does_not_start_is_an_error_before_any_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fake does not start: ConnectionError: no network"):
        run(tmp_path / "a", fake_order(tmp_path / "s", steps=(2,)), logger=FakeLogger(start="no network"))
    assert not (tmp_path / "a/metrics.jsonl").exists()
    # The same command without the tracker is the same training.
    run(tmp_path / "a", fake_order(tmp_path / "s", steps=(2,)))


def test_a_tracker_that_fails_midway_is_said_once_and_catches_up_at_the_restart(tmp_path: Path) -> None:
    order, out = fake_order(tmp_path / "s", steps=(6,)), tmp_path / "a"
    first = FakeLogger(fail_at=1)
    with (
        pytest.warns(
            KoineWarning, match=r"fake has failed \(OSError: .*full\); it has the .* before step 1"
        ) as said,
        pytest.raises(SystemExit),
    ):
        run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(4), logger=first)
    assert len(said) == 1
    assert record(out)["next_step"] == 1
    second = FakeLogger()
    run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(0), logger=second)
    assert [{"step": step, **figures} for step, figures in second.lines] == [
        line for line in metrics(out) if line["step"] >= 1
    ]
    run(tmp_path / "b", order, settings(evaluate_every=1), evaluate=interrupt_after(0))
    assert weights(out) == weights(tmp_path / "b")


def test_a_tracker_that_is_gone_at_the_restart_does_not_stop_the_training(tmp_path: Path) -> None:
    order, out = fake_order(tmp_path / "s", steps=(4,)), tmp_path / "a"
    with pytest.raises(SystemExit):
        run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(2), logger=FakeLogger())
    with pytest.warns(KoineWarning, match="fake has failed"):
        run(
            out,
            order,
            settings(evaluate_every=1),
            evaluate=interrupt_after(0),
            logger=FakeLogger(start="gone"),
        )
    assert (out / "model.safetensors").exists()
    assert record(out) == {"tracker": "fake", "run": "new", "next_step": 2}


def test_a_tracker_that_is_added_later_gets_everything(tmp_path: Path) -> None:
    order, out, late = fake_order(tmp_path / "s", steps=(4,)), tmp_path / "a", FakeLogger()
    with pytest.raises(SystemExit):
        run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(2))
    run(out, order, settings(evaluate_every=1), evaluate=interrupt_after(0), logger=late)
    assert [{"step": step, **figures} for step, figures in late.lines] == metrics(out)


def test_a_tracker_that_hangs_does_not_hold_the_training_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "FINISH_SECONDS", 0.2)
    logger = FakeLogger(hang_at=1)
    with pytest.warns(KoineWarning, match="no answer in"):
        run(tmp_path / "a", fake_order(tmp_path / "s", steps=(4,)), logger=logger)
    logger.released.set()
    assert len(metrics(tmp_path / "a")) == 4
    assert (tmp_path / "a/model.safetensors").exists()


def test_a_tracker_that_is_far_behind_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_WAITING", 2)
    logger = FakeLogger(hang_at=0)
    with pytest.warns(KoineWarning, match="it is 2 lines behind"):
        run(tmp_path / "a", fake_order(tmp_path / "s", steps=(6,)), logger=logger)
    logger.released.set()
    assert len(metrics(tmp_path / "a")) == 6


def test_a_failed_training_is_said_to_have_failed(tmp_path: Path) -> None:
    logger = FakeLogger()

    def evaluate(model: Any, steps_done: int) -> dict[str, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(
            tmp_path / "a", fake_order(tmp_path / "s", steps=(4,)), settings(evaluate_every=2), evaluate=evaluate,
            logger=logger,
        )  # fmt: skip
    assert logger.outcome == "failed"


def test_the_name_is_that_of_the_artifact_inside_a_run(tmp_path: Path) -> None:
    logger, out = FakeLogger(), tmp_path / "runs/quick/.work/deep/base"
    out.mkdir(parents=True)
    run(out, fake_order(tmp_path / "s", steps=(1,)), logger=logger)
    assert logger.runs[0].name == "quick/deep/base"


def test_the_tracker_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KOINE_TRACK", raising=False)
    assert logger_from_environment() is None
    monkeypatch.setenv("KOINE_TRACK", "wandbb")
    with pytest.raises(UserError, match=r"unknown tracker 'wandbb'.*wandb"):
        logger_from_environment()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="the package 'wandb' is needed"):
        open_run_logger("wandb")
