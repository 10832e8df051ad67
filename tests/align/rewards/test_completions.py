"""Scoring files of completions, and reading the result back as groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.align.rewards import RewardFailure, RewardOutcome
from koine.align.rewards import completions as module
from koine.align.rewards.completions import read_completions, score_rows
from koine.data import RecordFormat, read_records
from koine.errors import UserError


def length(conversation: Any, completion: str, record: Any) -> float:
    if completion == "fails":
        raise RewardFailure("no reason")
    return float(len(completion))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("batch", [1, 256])
def test_scores_stand_beside_their_completions(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", batch)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = write(
        tmp_path / "c.jsonl",
        {"prompt": "a", "completions": ["xxx", "fails", ""], "id": "1"},
        {"prompt": turns, "completion": "fails"},
        {"prompt": "b", "completion": "xx"},
        {"prompt": "b", "completions": ["fails"]},
    )
    outcomes: list[RewardOutcome] = []
    rows = list(score_rows(read_completions(path, length), length, outcomes))
    failed = {"completion": "fails", "failure": "no reason"}
    assert rows == [
        {"prompt": "a", "completions": ["xxx", ""], "id": "1", "scores": [3.0, 0.0], "failed": [failed]},
        {"prompt": turns, "completion": "fails", "score": None, "failure": "no reason"},
        {"prompt": "b", "completion": "xx", "score": 2.0},
        {"prompt": "b", "completions": [], "scores": [], "failed": [failed]},
    ]
    assert [outcome.value for outcome in outcomes] == [3.0, None, 0.0, None, 2.0, None]


def test_scored_rows_are_groups_of_scored_completions(tmp_path: Path) -> None:
    source = write(tmp_path / "c.jsonl", {"prompt": "a", "completions": ["xxx", "y"], "language": "en"})
    rows = list(score_rows(read_completions(source, length), length, []))
    reader = read_records(write(tmp_path / "s.jsonl", *rows), record_format=RecordFormat(None, "all"))
    (record,) = list(reader)
    assert record["scores"] == [3.0, 1.0]
    assert [answer[0]["content"] for answer in record["completions"]] == ["xxx", "y"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "x"}, "the prompt is None"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "the prompt is"),
        ({"prompt": "a"}, "either 'completion' or 'completions'"),
        ({"prompt": "a", "completion": "x", "completions": ["x"]}, "either 'completion' or 'completions'"),
        ({"prompt": "a", "completions": []}, "completions are"),
        ({"prompt": "a", "completion": 3}, "completions are"),
        ([1], "line 2"),
    ],
)
def test_rows_of_another_form(row: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", {"prompt": "a", "completion": "x"}, row)
    with pytest.raises(UserError, match=message) as caught:
        list(read_completions(path, length))
    assert "c.jsonl, line 2" in str(caught.value)
