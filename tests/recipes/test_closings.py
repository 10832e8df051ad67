"""What recipes print at their end, from the files that their steps leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.evaluate.example_questions import Example, Examples
from koine.files import write_json
from koine.plan import FinishedRun
from koine.recipes.closings import chat_answer, example_lines, trained_model

JAPAN = Example("Welche Währung hat Japan?", "Japanischer Yen", "de", "currency", 0.9)
BRAZIL = Example("Which language does Brazil speak?", "Portuguese", "en", "language", 0.8)
MAY = Example("5月の次の月は?", "6月", "ja", "month", 0.95)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinishedRun:
    """A run started as `.venv/bin/koine`, which is not on PATH."""
    program = tmp_path / ".venv" / "bin" / "koine"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [".venv/bin/koine", "run", "x"])
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("COLUMNS", "100")
    folder = Path("runs") / "x"
    (folder / "model").mkdir(parents=True)
    (folder / "comparison").mkdir()
    nodes = ({"name": "model", "purpose": "Teach it.", "seconds": 3.0, "status": "built"},)
    return FinishedRun(folder, 60.0, nodes)


def test_the_answer_has_verdict_stages_examples_and_commands(run: FinishedRun) -> None:
    verdict = {"kind": "verdict", "title": "was it faster?", "text": "Yes: 2.5 times as fast."}
    write_json(run.folder / "comparison" / "report.json", {"title": "t", "blocks": [verdict]})
    Examples(960, 612, (JAPAN, BRAZIL, MAY, JAPAN)).save(run.folder / "model")
    assert chat_answer(run, run.folder / "comparison").splitlines() == [
        "",
        "What each step was for (seconds of all its steps)",
        "  model  3.0 s  Teach it.",
        "",
        "The question: was it faster?",
        "  Yes: 2.5 times as fast.",
        "",
        "The model answered 612 of the 960 questions of its evaluation right. For example:",
        "  Welche Währung hat Japan?",
        "    Japanischer Yen",
        "  Which language does Brazil speak?",
        "    Portuguese",
        "  5月の次の月は?",
        "    6月",
        "",
        "the report:   runs/x/report.html",
        "chat with it: .venv/bin/koine chat runs/x/model",
        "one answer:   .venv/bin/koine chat runs/x/model --once 'Welche Währung hat Japan?' --temperature 0",
    ]


def test_without_questions_and_verdict_the_commands_remain(run: FinishedRun) -> None:
    assert chat_answer(run, run.folder / "comparison").splitlines()[-3:] == [
        "",
        "the report:   runs/x/report.html",
        "chat with it: .venv/bin/koine chat runs/x/model",
    ]


def test_few_right_answers_are_said_to_be_few() -> None:
    assert example_lines(Examples(40, 0, ())) == [
        "The model answered none of the 40 questions of its evaluation right."
    ]
    assert example_lines(Examples(40, 1, (JAPAN,)))[0] == (
        "The model answered 1 of the 40 questions of its evaluation right. Only 1 can be shown:"
    )
    assert example_lines(Examples(40, 2, ())) == [
        "The model answered 2 of the 40 questions of its evaluation right, none of them in one turn."
    ]


def test_other_recipes_name_commands_that_work(run: FinishedRun) -> None:
    assert trained_model(run, "bits per byte", "model").splitlines() == [
        "bits per byte:         runs/x/report.html",
        "the model:             runs/x/model",
        "its sizes:             .venv/bin/koine model describe runs/x/model",
        "what it was made from: .venv/bin/koine lineage runs/x/model",
    ]
