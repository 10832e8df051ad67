"""Records to evaluate on: whole folders, chosen splits, limits, bad records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from koine.cli.evaluate.commands import evaluate
from koine.errors import KoineWarning, UserError
from koine.evaluate.records import RecordOptions, Records
from tests.bad_inputs import worlds


def write(path: Path, *texts: str, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    worlds.write_lines(path, [{"text": text, **more} for text in texts])


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "train.jsonl", "a cat", language="en")
    write(tmp_path / "data" / "test.jsonl", "ein Hund", language="de")
    return tmp_path / "data"


def texts(path: Path, **options: Any) -> list[str]:
    return [record["text"] for record in Records([path], RecordOptions(**options))]


def test_a_folder_of_several_splits_is_refused_until_one_is_chosen(splits: Path) -> None:
    with pytest.raises(
        UserError, match=r"several splits \(test, train\); say which is meant.*--split test, or all"
    ):
        Records([splits], RecordOptions())
    assert texts(splits, split="test") == ["ein Hund"]
    assert texts(splits, split="train") == ["a cat"]
    assert texts(splits, split="all") == ["ein Hund", "a cat"]


def test_a_preferred_split_is_read_where_there_are_several(splits: Path, tmp_path: Path) -> None:
    def read(path: Path, **options: Any) -> list[str]:
        records = Records([path], RecordOptions(**options), preferred_split="train")
        return [record["text"] for record in records]

    assert read(splits) == ["a cat"]
    assert read(splits, split="test") == ["ein Hund"]
    write(tmp_path / "one" / "test.jsonl", "alone")
    assert read(tmp_path / "one") == ["alone"]


def test_kind_and_fact_of_a_question_are_carried(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "?"}]
    record = {"messages": messages, "answer": "Euro", "kind": "currency", "fact": "currency:DE", "other": 1}
    worlds.write_lines(tmp_path / "a.jsonl", [record])
    (read,) = Records([tmp_path / "a.jsonl"], RecordOptions(), questions=True)
    assert {key: read[key] for key in ("answer", "kind", "fact")} == {
        "answer": "Euro",
        "kind": "currency",
        "fact": "currency:DE",
    }


def test_a_folder_of_one_split_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "test-00000-of-00002.jsonl", "one")
    write(tmp_path / "test-00001-of-00002.jsonl", "two")
    write(tmp_path / "more.jsonl", "three")
    assert sorted(texts(tmp_path)) == ["one", "three", "two"]


def test_a_data_set_of_the_hub_is_read(splits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(splits))
    records = Records(["hub:someone/something"], RecordOptions(split="test"))
    assert [record["text"] for record in records] == ["ein Hund"]


def test_bad_records_are_noted(tmp_path: Path) -> None:
    worlds.write_lines(tmp_path / "a.jsonl", [{"text": "good"}, {"text": ""}])
    records = Records([tmp_path / "a.jsonl"], RecordOptions(max_bad_share=0.5))
    assert len(list(records)) == 1
    with pytest.warns(
        KoineWarning, match="1 bad records were left out, the first: .*line 2: the text is empty"
    ):
        records.warn_of_bad()


def test_the_command_reads_as_the_other_readers_do(tmp_path: Path) -> None:
    model = worlds.built("model")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        worlds.write_lines(folder / f"{name}.jsonl", [{"body": f"the cat {name}"}])
    out = tmp_path / "results.json"
    words = ["--data", folder, "--split", "test", "--field", "text=body", "--language", "eng", "--out", out]
    done = CliRunner().invoke(evaluate, [str(model), *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    languages = json.loads(out.read_text())["languages"]
    assert {code: entry["documents"] for code, entry in languages.items()} == {"en": 1}


def test_a_limit_counts_the_records_of_each_language(splits: Path, tmp_path: Path) -> None:
    write(tmp_path / "more.jsonl", "two", "three", language="en")
    records = Records([splits, tmp_path / "more.jsonl"], RecordOptions(split="all"), limit=2)
    for _ in range(2):  # they can be read again
        assert [record["text"] for record in records] == ["ein Hund", "a cat", "two"]
    with pytest.raises(UserError, match="the limit is 0"):
        Records([splits], RecordOptions(split="all"), limit=0)
