"""Runs of small plans through the command, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAN = """\
import time
from pathlib import Path
from koine.errors import UserError
from koine.plan import Plan, step

@step()
def slow(*, n: int, out: Path) -> None:
    for i in range(n):
        if not (out / str(i)).exists():
            (out / str(i)).write_text(str(i))
            time.sleep(0.1)

@step()
def crash(*, out: Path) -> None:
    raise ValueError("broken on purpose")

@step()
def join(source: Path, *, out: Path) -> None:
    (out / "all").write_text("".join(p.read_text() for p in sorted(source.glob("[0-9]*"))))

def demo(plan: Plan, *, n: int = 2) -> None:
    plan.step(join, name="joined/all", source=plan.step(slow, name="slow", n=n))

def broken(plan: Plan) -> None:
    bad = plan.step(crash, name="bad")
    plan.step(join, name="after", source=bad)
    plan.step(slow, name="other", n=1)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "plans.py").write_text(PLAN)
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "koine", "run", *arguments],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(place: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(place, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_reused_when_equal_and_the_difference_named_when_not(place: Path) -> None:
    assert run(place, "plans.py:demo")[0] == 0
    assert (place / "runs/demo/joined/all/all").read_text() == "01"
    assert "started" not in run(place, "plans.py:demo")[1]
    lines = run(place, "plans.py:demo", "--set", "n=3", "--dry-run")[1].splitlines()
    assert [line.split()[:2] + line.split()[-4:] for line in lines if line.startswith("slow")] == [
        ["slow", "built", "parameters.n:", "2", "→", "3"]
    ]


def test_dry_run_changes_nothing(place: Path) -> None:
    assert run(place, "plans.py:demo", "--dry-run")[0] == 0
    assert not (place / "runs").exists()


def test_unknown_setting_is_refused_with_the_known_ones(place: Path) -> None:
    code, _, err = run(place, "plans.py:demo", "--set", "m=3")
    assert code == 2
    assert "known: n" in err


def test_other_branches_end_when_a_step_crashes(place: Path) -> None:
    code, _, err = run(place, "plans.py:broken")
    assert code == 1
    assert "bad.log" in err
    assert "broken on purpose" in err
    assert (place / "runs/broken/other/artifact.json").exists()
    assert not (place / "runs/broken/after").exists()


def test_a_killed_run_kills_its_workers_and_the_next_run_resumes(place: Path) -> None:
    process = start(place, "plans.py:demo", "--set", "n=15")
    work = place / "runs/demo/.work/slow"
    while not (work / "3").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)
    frozen = (work / "3").stat().st_mtime_ns
    count = len(list(work.iterdir()))
    time.sleep(0.5)
    assert len(list(work.iterdir())) == count < 15
    assert run(place, "plans.py:demo", "--set", "n=15")[0] == 0
    assert (place / "runs/demo/slow/3").stat().st_mtime_ns == frozen
    assert (place / "runs/demo/joined/all/all").read_text() == "".join(sorted(map(str, range(15)), key=str))


def test_two_runs_at_once_build_each_artifact_once(place: Path) -> None:
    both = [start(place, "plans.py:demo", "--set", "n=8") for _ in range(2)]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    logs = place / "runs/demo"
    assert (logs / "joined/all/all").read_text() == "01234567"
