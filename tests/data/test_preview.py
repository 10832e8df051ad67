"""The beginning of a data set, looked at before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from koine.data import preview
from koine.data.preview import preview_records
from koine.errors import UserError


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_small_data_are_known_as_a_whole(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"text": "größer", "language": "de"},
        {"text": "abc", "language": "deu"},
        {"text": "no language"},
        {"messages": TURNS, "language": "fr"},
    )
    found = preview_records(path, fields={}, max_bad_share=0.0)
    assert found.text_bytes == {"de": 8 + 3, "und": 11}
    assert (found.documents, found.chat_languages, found.whole) == (3, ("fr",), True)
    assert (found.chats, found.chat_bytes) == (1, 4)
    assert found.languages == ("de", "fr")
    assert found.file_bytes == path.stat().st_size


def test_large_data_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "PREVIEW_BYTES", 10)
    path = write(tmp_path / "a.jsonl", *[{"text": "abcdef", "language": "de"}] * 3, {"nothing": 1})
    found = preview_records(path, fields={}, max_bad_share=0.0)
    assert (found.whole, found.documents) == (False, 2)


def test_bad_records_at_the_beginning_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "PREVIEW_BYTES", 10)
    path = write(tmp_path / "a.jsonl", {"nothing": 1}, *[{"text": "abcdef", "language": "de"}] * 3)
    with pytest.raises(UserError, match="1 of 3 records are bad"):
        preview_records(path, fields={}, max_bad_share=0.3)
    assert preview_records(path, fields={}, max_bad_share=0.5).documents == 2


def test_a_format_is_read_as_the_run_reads_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"instruction": "What?", "output": "That."})
    assert preview_records(path, fields={}, max_bad_share=0.0).chats == 1
    with pytest.raises(UserError, match="lacks fields of the format sharegpt"):
        preview_records(path, fields={}, max_bad_share=0.0, record_format="sharegpt")
