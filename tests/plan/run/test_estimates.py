"""Estimates: formulas, their correction, the critical path by hand, and a real run against its estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.plan import Artifact, Estimate, Plan, step
from koine.plan.formatting import duration, size
from koine.plan.run.dry_run import dry_run_lines
from koine.plan.run.estimates import START_SECONDS, critical_path, expect, makespan, remaining, scaled
from koine.plan.run.scheduler import execute

BASE = 40 * 1024**2  # a Python process with Koine's plan modules


def needs(*, megabytes: int, seconds: float) -> Estimate:
    return Estimate(BASE + megabytes * 1024**2, seconds)


@step(estimate=needs)
def fill(*, megabytes: int, seconds: float, out: Path) -> None:
    """Hold so many megabytes for so long."""
    import time

    held = bytearray(b"x") * (megabytes * 1024**2)
    time.sleep(seconds)
    (out / "size").write_text(str(len(held)))


@step(estimate=needs)
def fill_in_child(*, megabytes: int, seconds: float, out: Path) -> None:
    """The same in a child process."""
    import subprocess
    import sys

    program = f"import time; held = bytearray(b'x') * ({megabytes} * 2**20); time.sleep({seconds})"
    subprocess.run([sys.executable, "-c", program], check=True)
    (out / "size").write_text(str(megabytes))


def after(source: Path, *, seconds: float) -> Estimate:
    return Estimate(BASE, seconds)


@step(estimate=after)
def follow(source: Path, *, seconds: float, out: Path) -> None:
    (out / "x").write_text("x")


def test_the_critical_path_is_the_longest_chain(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    a = plan.step(fill, name="a", megabytes=1, seconds=2.0)
    b = plan.step(fill, name="b", megabytes=1, seconds=3.0)
    plan.step(follow, name="after-a", source=a, seconds=4.0)
    plan.step(follow, name="after-b", source=b, seconds=1.0)
    expectation = expect(plan, plan.nodes)
    seconds = {name: estimate.seconds for name, estimate in expectation.steps.items()}
    assert critical_path(plan, seconds) == (["a", "after-a"], 6.0)
    assert expectation.seconds == 10.0
    assert "Time: 10.0 s one after another; at least 6.0 s side by side: a → after-a" in dry_run_lines(plan)


def test_the_step_with_the_longest_chain_behind_it_goes_first(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    a = plan.step(fill, name="a", megabytes=1, seconds=2.0)
    plan.step(fill, name="alone", megabytes=1, seconds=5.0)
    b = plan.step(follow, name="b", source=a, seconds=3.0)
    plan.step(follow, name="c", source=b, seconds=1.0)
    seconds = {"a": 2.0, "alone": 5.0, "b": 3.0, "c": 1.0}
    assert remaining(plan, seconds) == {"a": 6.0, "alone": 5.0, "b": 4.0, "c": 1.0}


def recorded(artifact: Artifact) -> dict[str, object]:
    return dict(json.loads((artifact.path / "artifact.json").read_text()))


def test_a_real_run_stays_within_its_estimate_and_refines_the_time(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    own = plan.step(fill, name="own", megabytes=150, seconds=0.6)
    child = plan.step(fill_in_child, name="child", megabytes=150, seconds=0.6)
    before = expect(plan, plan.nodes).steps
    execute(plan)
    for artifact in (own, child):
        record = recorded(artifact)
        actual = record["peak_memory_bytes"]
        assert isinstance(actual, int)
        # The formula is right up to the interpreter's own size, which differs by version; a factor of 1.5 holds that.
        assert before[artifact.name].memory_bytes / 1.5 < actual < before[artifact.name].memory_bytes * 1.5
        assert record["estimate"] == {
            "memory_bytes": before[artifact.name].memory_bytes,
            "seconds": 0.6,
            "formula_seconds": 0.6,
            "disk_bytes": 0,
            "measured": True,
        }
    # The same step with twice the work: the formula, scaled by actual over estimated time of the build on record.
    seconds = recorded(own)["seconds"]
    assert isinstance(seconds, float)
    again = Plan("demo", tmp_path)
    again.step(fill, name="own", megabytes=150, seconds=1.2)
    assert expect(again, again.nodes).steps["own"].seconds == pytest.approx(1.2 * seconds / 0.6)


@step()
def no_formula(*, n: int, out: Path) -> None:
    (out / "n").write_text(str(n))


def test_without_a_formula_an_earlier_build_is_the_estimate(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    artifact = plan.step(no_formula, name="a", n=1)
    assert expect(plan, plan.nodes).unknown == ("a",)
    execute(plan)
    again = Plan("demo", tmp_path)
    again.step(no_formula, name="a", n=2)
    expected = expect(again, again.nodes).steps["a"]
    record = recorded(artifact)
    assert (expected.seconds, expected.memory_bytes) == (record["seconds"], record["peak_memory_bytes"])


def test_steps_that_do_not_fit_side_by_side_run_one_after_another(tmp_path: Path) -> None:
    from koine.plan.run.local import LocalExecutor

    plan = Plan("demo", tmp_path)
    for name in ("a", "b"):
        plan.step(fill, name=name, megabytes=10, seconds=0.2)
    executor = LocalExecutor(cores=2)
    executor.free_memory = 1.5 * (BASE + 10 * 1024**2)  # type: ignore[assignment]
    execute(plan, executor=executor)
    a, b = sorted(
        (recorded(plan.nodes[name].artifact) for name in ("a", "b")), key=lambda r: str(r["started"])
    )
    assert a["finished"] <= b["started"]  # type: ignore[operator]


def wrong(*, n: int) -> Estimate:
    return 3  # type: ignore[return-value]


@step(estimate=wrong)
def misjudged(*, n: int, out: Path) -> None: ...


def test_an_estimate_of_another_type_is_refused(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    plan.step(misjudged, name="a", n=1)
    with pytest.raises(UserError, match="must return an Estimate"):
        dry_run_lines(plan)


def test_times_and_sizes_are_formatted() -> None:
    assert [duration(0.44), duration(125), duration(3720)] == ["0.4 s", "2 min 05 s", "1 h 02 min"]
    assert [size(512 * 1024), size(312 * 1024**2), size(1.25 * 1024**3)] == ["512 KiB", "312 MiB", "1.2 GiB"]


def test_the_time_on_a_machine_follows_from_its_cores_and_memory(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    a = plan.step(fill, name="a", megabytes=1, seconds=2.0)
    plan.step(fill, name="b", megabytes=1, seconds=3.0)
    plan.step(fill, name="c", megabytes=1, seconds=4.0)
    plan.step(follow, name="after-a", source=a, seconds=4.0)
    found = expect(plan, plan.nodes)
    start = START_SECONDS
    assert makespan(plan, found, cores=1, free_memory=None) == pytest.approx(13 + 4 * start)
    # a, c first; b begins with after-a at 2 and takes the core of c at 4: 2 + 4, or 4 + 3.
    assert makespan(plan, found, cores=2, free_memory=None) == pytest.approx(7 + 2 * start)
    assert makespan(plan, found, cores=9, free_memory=None) == pytest.approx(6 + 2 * start)
    assert makespan(plan, found, cores=9, free_memory=BASE) == pytest.approx(13 + 4 * start)


def test_an_assumed_speed_is_not_corrected_by_builds_of_a_measured_one(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    plan.step(fill, name="a", megabytes=1, seconds=2.0)
    records = [
        {"seconds": 10.0, "estimate": {"formula_seconds": 5.0, "measured": True}},
        {"seconds": 90.0, "estimate": {"formula_seconds": 5.0, "measured": False}},
    ]
    for measured, expected in ((True, 4.0), (False, 36.0)):
        given = Estimate(1, 2.0, 7, 8, "basis", measured)
        corrected = scaled(plan.nodes["a"], given, records)
        assert corrected == Estimate(1, expected, 7, 8, "basis", measured)


def test_where_times_come_from_is_said_once(tmp_path: Path) -> None:
    plan = Plan("demo", tmp_path)
    for name in ("a", "b"):
        plan.step(measured, name=name)
    assert [line for line in dry_run_lines(plan) if line == "Speed: measured now."] == [
        "Speed: measured now."
    ]


def say(**_: object) -> Estimate:
    return Estimate(1, 1.0, basis="Speed: measured now.")


@step(estimate=say)
def measured(*, out: Path) -> None: ...
