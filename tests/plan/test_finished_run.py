"""What closings learn about a run: its total time, stages and verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.files import write_json
from koine.plan.finished_run import FinishedRun, read_verdict


def node(name: str, purpose: str, seconds: float | None, status: str = "built") -> dict[str, Any]:
    return {"name": name, "purpose": purpose, "seconds": seconds, "status": status}


NODES = (
    node("corpus", "Write text.", 3.0),
    node("trained/a", "Train with each tokenizer.", 60.0),
    node("trained/b", "Train with each tokenizer.", 70.0, "reused"),
    node("left", "Nobody reads this.", None, "not needed"),
    node("judged", "", 0.2),
)


def test_the_total_counts_what_was_built_and_reused() -> None:
    assert FinishedRun(Path("runs/x"), 65.2, NODES).total() == (
        "total time: 1 min 05 s (3 built, 1 reused, 1 not needed)"
    )
    reused = tuple({**one, "status": "reused"} for one in NODES[:3])
    assert FinishedRun(Path("runs/x"), 0.3, reused).total() == (
        "total time: 0.3 s (3 reused; when they were built, the steps took 2 min 13 s)"
    )


def test_steps_of_one_purpose_are_one_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert FinishedRun(Path("runs/x"), 1.0, NODES).stage_lines() == [
        "  corpus           3.0 s  Write text.",
        "  trained ×2  2 min 10 s  Train with each tokenizer.",
        "  judged           0.2 s  judged",
    ]


def test_a_narrow_terminal_gets_wrapped_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    lines = FinishedRun(
        Path("runs/x"), 1.0, (node("a", "Train one model for each of them, " * 3, 1.0),)
    ).stage_lines()
    assert len(lines) > 2
    assert all(len(line) <= 50 for line in lines)
    assert all(line.startswith(" " * 12) for line in lines[1:])


def test_the_verdict_is_the_reports(tmp_path: Path) -> None:
    assert read_verdict(tmp_path) is None
    blocks: list[dict[str, Any]] = [{"kind": "text", "text": "no"}]
    write_json(tmp_path / "report.json", {"title": "t", "blocks": blocks})
    assert read_verdict(tmp_path) is None
    blocks.append({"kind": "verdict", "title": "was it?", "text": "Yes: 2.5 times."})
    write_json(tmp_path / "report.json", {"title": "t", "blocks": blocks})
    assert read_verdict(tmp_path) == ("was it?", "Yes: 2.5 times.")
