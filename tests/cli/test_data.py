"""What `koine data` says beside its tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from koine.cli.main import cli
from koine.errors import KoineWarning

PAIR = '{"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red.", "language": "en"}\n'
TASK = '{"instruction": "Sky?", "output": "Blue.", "language": "en"}\n'


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


def test_one_record_is_not_called_records(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(TASK + '{"title": "a"}\n')
    said = inspect(path, "--max-bad", "0.5")
    assert "read as alpaca: 1 record\n" in said
    assert "1 bad record left out, the first:\n" in said
    path.write_text(TASK * 2)
    assert "read as alpaca: 2 records\n" in inspect(path)
