"""Time left and progress of a run, against schedules and corrections worked out by hand."""

from __future__ import annotations

import time

import pytest

from koine.plan.run.time_left import RunProgress, StepProgress, makespan


def waiting(expected: float | None, *parents: str, function: str = "f", **more: int) -> StepProgress:
    return StepProgress(function=function, expected=expected, parents=parents, **more)


class Clock:
    """A clock that the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_independent_steps_run_side_by_side_and_chains_one_after_another() -> None:
    steps = {
        "a": waiting(3.0),
        "b": waiting(4.0),
        "a2": waiting(5.0, "a"),
        "b2": waiting(1.0, "b"),
        "end": waiting(2.0, "a2", "b2"),
    }
    left = {name: one.expected or 0.0 for name, one in steps.items()}
    assert makespan(steps, left, cores=2, memory=None) == 3 + 5 + 2
    assert makespan(steps, left, cores=1, memory=None) == 15


def test_a_step_waits_for_cores_and_memory_as_in_the_scheduler() -> None:
    left = {"a": 3.0, "b": 4.0}
    assert makespan({"a": waiting(3.0), "b": waiting(4.0, cores=2)}, left, cores=2, memory=None) == 7
    # A single step always runs, however much it needs.
    assert makespan({"a": waiting(3.0, cores=8), "b": waiting(4.0)}, left, cores=2, memory=None) == 7
    large = {"a": waiting(3.0, memory=60), "b": waiting(4.0, memory=60)}
    assert makespan(large, left, cores=2, memory=100) == 7
    assert makespan(large, left, cores=2, memory=120) == 4


def test_parents_that_this_run_does_not_build_are_there_already() -> None:
    assert makespan({"b": waiting(4.0, "reused")}, {"b": 4.0}, cores=1, memory=None) == 4


def test_finished_steps_correct_the_estimates_of_the_same_function(clock: Clock) -> None:
    """Training took twice its estimate; evaluation is corrected by less, because it is another function."""
    run = RunProgress(
        {
            "first": waiting(10.0, function="train"),
            "second": waiting(10.0, "first", function="train"),
            "third": waiting(10.0, "second", function="evaluate"),
        },
        cores=1,
    )
    assert run.overall().seconds_left == 30
    run.start("first")
    clock.now += 20
    run.end("first", measured=True)
    totals = run.expected_totals(clock.now)
    assert totals is not None
    assert totals["second"] == 20
    # 20 s measured and a prior of a fifth of 30 s, over 10 s expected and the same prior.
    assert totals["third"] == pytest.approx(10 * (20 + 6) / (10 + 6))
    state = run.overall()
    assert state.seconds_left == pytest.approx(20 + totals["third"])
    assert state.fraction == pytest.approx(20 / (20 + 20 + totals["third"]))
    assert (state.step, state.ended, state.steps) == (2, 1, 3)


def test_a_running_step_counts_by_its_own_speed_after_its_first_report(clock: Clock) -> None:
    """Resumed at 60 %: the share that was done before says nothing about the speed."""
    run = RunProgress({"train": waiting(100.0)}, cores=1)
    run.start("train")
    clock.now += 5
    run.report("train", 0.6)
    assert run.overall().seconds_left == pytest.approx(0.4 * 100)
    clock.now += 30
    run.report("train", 0.9)
    # 30 % took 30 s.
    assert run.overall().seconds_left == pytest.approx(10)


def test_a_step_that_takes_longer_than_expected_still_needs_some_time(clock: Clock) -> None:
    run = RunProgress({"one": waiting(2.0)}, cores=1)
    run.start("one")
    clock.now += 1
    assert run.overall().seconds_left == pytest.approx(1)
    clock.now += 99
    assert run.overall().seconds_left == pytest.approx(5)


def test_without_estimates_finished_steps_tell_how_long_others_take(clock: Clock) -> None:
    run = RunProgress({name: waiting(None) for name in "abcd"}, cores=1)
    state = run.overall()
    assert (state.seconds_left, state.fraction) == (None, 0.0)
    run.start("a")
    clock.now += 7
    run.end("a", measured=True)
    state = run.overall()
    assert (state.seconds_left, state.fraction) == (21, 0.25)


def test_steps_that_another_run_built_or_that_never_ran_correct_nothing(clock: Clock) -> None:
    run = RunProgress({"a": waiting(10.0), "b": waiting(10.0), "c": waiting(10.0)}, cores=1)
    run.start("a")
    clock.now += 1
    run.end("a", measured=False)
    run.end("b", measured=False)
    state = run.overall()
    assert state.seconds_left == 10
    assert state.ended == 2


def test_the_bar_never_goes_back(clock: Clock) -> None:
    run = RunProgress({"a": waiting(1.0), "b": waiting(1.0, "a")}, cores=1)
    run.start("a")
    clock.now += 0.9
    before = run.overall().fraction
    clock.now += 9.1
    run.end("a", measured=True)
    assert run.overall().fraction >= before > 0.4
