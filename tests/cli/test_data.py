"""What `koine data` says beside its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.errors import KoineWarning
from tests.bad_inputs import worlds

PAIR = '{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red.", "language": "en"}\n'
TASK = '{"instruction": "Sky?", "output": "Blue.", "language": "en"}\n'


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    return worlds.built("tokenizer")


def inspect(path: Path, *words: str) -> str:
    done = CliRunner().invoke(cli, ["data", "inspect", str(path), *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_rejected_answers_of_no_preferences_are_noted(tmp_path: Path) -> None:
    pairs, tasks = tmp_path / "pairs.jsonl", tmp_path / "tasks.jsonl"
    pairs.write_text(PAIR)
    tasks.write_text(TASK)
    with pytest.warns(KoineWarning, match="--take rejected changed nothing: there are no preference records"):
        inspect(tasks, "--take", "rejected")
    assert "their rejected answers (--take chosen reads the others)" in inspect(pairs, "--take", "rejected")


SCORED = '{"prompt": "Sky?", "completions": ["Red.", "Blue."], "scores": [0.0, 1.0], "language": "en"}\n'
LABELLED = '{"prompt": "Sky?", "completion": "Blue.", "label": true, "language": "en"}\n'


def test_scored_completions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "scored.jsonl"
    path.write_text(SCORED)
    said = inspect(path)
    assert (
        "read as scored-completions: 1 record, their best completions (--take rejected reads the worst)"
        in said
    )
    # No warning: the worst completions are read.
    said = inspect(path, "--take", "rejected")
    assert "their worst completions (--take chosen reads the best)" in said


@pytest.mark.parametrize(
    ("kind", "record"), [("preferences", PAIR), ("scored", SCORED), ("labelled", LABELLED)]
)
def test_tokenize_says_that_all_answers_are_read(
    kind: str, record: str, tmp_path: Path, tokenizer: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(record * 3)
    words = ["data", "tokenize", str(path), "--kind", kind, "--tokenizer", str(tokenizer), "--out"]
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "out")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert ": 3 records, all of their answers" in done.output


def test_one_record_is_not_called_records(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(TASK + '{"title": "a"}\n')
    said = inspect(path, "--max-bad", "0.5")
    assert "read as alpaca: 1 record\n" in said
    assert "1 bad record left out, the first:\n" in said
    path.write_text(TASK * 2)
    assert "read as alpaca: 2 records\n" in inspect(path)
