"""Signals and kills: a step saves its state and resumes, and no process outlives the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.plan.running import koine, start, until

PLAN = """\
import os, signal, subprocess, sys, time
from pathlib import Path
from koine.plan import Plan, step

@step()
def saves(*, out: Path) -> None:
    asked = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    begin = int((out / "saved").read_text()) if (out / "saved").exists() else 0
    for i in range(begin, 30):
        (out / "doing").write_text(str(i))
        time.sleep(0.05)
        if asked:
            (out / "saved").write_text(str(i))
            raise SystemExit(128 + asked[0])
    (out / "result").write_text(f"from {begin}")

@step()
def with_children(*, out: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "partial").write_text(f"{os.getpid()} {child.pid}")
    (out / "partial").rename(out / "pids")
    child.wait()

@step()
def forgets_a_child(*, out: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (out / "pid").write_text(str(child.pid))

@step()
def leaves(*, out: Path) -> None:
    sys.exit(0)

def saving(plan: Plan) -> None:
    plan.step(saves, name="saves")

def parent(plan: Plan) -> None:
    plan.step(with_children, name="children")

def forgetful(plan: Plan) -> None:
    plan.step(forgets_a_child, name="forgetful")

def leaving(plan: Plan) -> None:
    plan.step(leaves, name="leaves")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "plans.py").write_text(PLAN)
    return tmp_path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_the_step_which_saves_and_goes_on_in_the_next_run(
    place: Path, number: signal.Signals, code: int
) -> None:
    process = start(place, "run", "plans.py:saving")
    work = place / "runs/saving/.work/saves"
    until(lambda: (work / "doing").exists())
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "run the same command again to continue" in err
    assert not (place / "runs/saving/saves").exists()
    saved = (work / "saved").read_text()
    assert '"status": "interrupted"' in (place / "runs/saving/plan.json").read_text()
    assert koine(place, "run", "plans.py:saving")[0] == 0
    assert (place / "runs/saving/saves/result").read_text() == f"from {saved}"
    log = (place / "runs/saving/logs/saves.log").read_text()
    assert "attempt 1" in log
    assert "attempt 2" in log


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_killed_run_kills_the_step_and_its_children(place: Path) -> None:
    process = start(place, "run", "plans.py:parent")
    pids = place / "runs/parent/.work/children/pids"
    until(pids.exists)
    worker, child = map(int, pids.read_text().split())
    assert alive(worker)
    assert alive(child)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: not alive(worker) and not alive(child))


def test_a_second_signal_stops_at_once(place: Path) -> None:
    process = start(place, "run", "plans.py:parent")
    pids = place / "runs/parent/.work/children/pids"
    until(pids.exists)
    worker, child = map(int, pids.read_text().split())
    os.kill(worker, signal.SIGSTOP)  # a step that does not listen
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    until(lambda: not alive(worker) and not alive(child))


def test_a_child_process_left_by_a_step_is_killed(place: Path) -> None:
    assert koine(place, "run", "plans.py:forgetful")[0] == 0
    child = int((place / "runs/forgetful/forgetful/pid").read_text())
    until(lambda: not alive(child))


def test_a_step_that_exits_instead_of_returning_has_failed(place: Path) -> None:
    code, _, err = koine(place, "run", "plans.py:leaving")
    assert code == 1
    assert "ended the process instead of returning" in err
    assert not (place / "runs/leaving/leaves").exists()
