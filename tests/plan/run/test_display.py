"""What a run prints without a terminal, and its bars in terminals of several widths."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from koine.plan.run.display import Display
from koine.plan.run.live_bars import LiveBars
from koine.plan.run.time_left import Overall


def test_one_plain_line_a_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display()
    display.started("a", "new")
    display.overall(Overall(0, 2, 0.0, 250.0))
    for second in range(13):
        now[0] = 100.0 + second
        display.progress("a", second / 20, f"item {second}")
        display.overall(Overall(0, 2, second / 40, 240.0))
    display.finished("a", "done", Overall(1, 2, 0.4, 42.0))
    display.started("b", "parameters.n: 2 → 3")
    now[0] += 2.0
    display.finished("b", "done", Overall(2, 2, 1.0, 0.0))
    assert capsys.readouterr().out.splitlines() == [
        "2 steps to run, about 4 minutes left",
        "step 1 of 2: a: done after 12.0 s, about 40 seconds left",
        "step 2 of 2: b: done after 2.0 s (parameters.n: 2 → 3)",
    ]


def test_a_long_step_says_every_minute_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display()
    display.overall(Overall(0, 1, 0.0, None))
    display.started("a", "new")
    for second in range(150):
        now[0] = 100.0 + second
        display.progress("a", second / 200, "")
        display.overall(Overall(0, 1, second / 200, 200.0 - second))
    assert capsys.readouterr().out.splitlines() == [
        "1 step to run",
        "running: a 30 % after 1 min 00 s, about 2 minutes left",
        "running: a 60 % after 2 min 00 s, about 1 minute left",
    ]


def test_a_step_that_another_run_builds_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.started("a", "new")
    for _ in range(3):
        display.progress("a", 0.0, "waiting: another run is building it")
    assert capsys.readouterr().out.splitlines() == ["a: waiting: another run is building it"]


@pytest.mark.parametrize("width", [80, 160])
def test_bars_fit_into_the_terminal(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    bars = LiveBars(console)
    bars.add("evaluation/universal/pretrained")
    bars.update(
        "evaluation/universal/pretrained", 0.5, "step 10/20  loss 5.891  5,765 tokens/s  " + "x" * 200
    )
    bars.overall(Overall(8, 22, 0.4, 250.0))
    with console.capture() as captured:
        console.print(bars.live.renderable)
    step, whole = captured.get().splitlines()
    assert len(step) <= width
    assert "evaluation/universal/pretrained" in step
    assert "━" in step
    assert " 50%" in step
    assert "step 10/20" in step
    assert step.rstrip().endswith("…")
    assert whole.startswith("step 9 of 22 ")
    assert whole.rstrip().endswith("about 4 minutes left")
    bars.remove("evaluation/universal/pretrained")
