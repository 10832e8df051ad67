"""Data sets of the hub: subsets, splits and patterns, fetched by the real client from a server on localhost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from koine.data import read_records
from koine.data.hub_data import card_subsets, dataset_folder
from koine.errors import UserError
from koine.evaluate.records import RecordOptions, Records
from tests import fake_hub

CARD = """---
configs:
- config_name: de
  data_files:
  - split: train
    path: de/first*.jsonl
  - split: validation
    path: [de/last.jsonl]
- config_name: en
  default: true
  data_files: en/*.jsonl
- config_name: hi
  data_dir: hi
---
# A data set
"""


def write(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    plain, cards = tmp_path / "plain", tmp_path / "cards"
    write(plain / "data" / "train-0.jsonl", "a")
    write(plain / "data" / "train_sft-0.jsonl", "s")
    write(plain / "data" / "test-0.jsonl", "b")
    write(plain / "more" / "extra.jsonl", "c")
    (plain / "LICENSE.txt").write_text("not a document")
    (plain / "picture.png").write_bytes(b"\x89PNG")
    for language in ("de", "en", "hi"):
        for name in ("first1", "first2", "last"):
            write(cards / language / f"{name}.jsonl", f"{language} {name}")
    (cards / "README.md").write_text(CARD, encoding="utf-8")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fake_hub.serve() as server:
        server.add("datasets", "org/plain", plain)
        server.add("datasets", "org/cards", cards)
        fake_hub.point_client(monkeypatch, server.endpoint, tmp_path)
        yield server


def texts(path: str, split: str = "train") -> list[str]:
    return [record["text"] for record in read_records(path, split=split)]


def test_all_files(served: fake_hub.FakeHub) -> None:
    assert texts("org/plain", "all") == ["b", "a", "s", "c"]
    assert texts("org/plain", "test") == ["b", "c"]
    # `train` is every split that begins so; the name of one is that one.
    assert texts("org/plain") == ["a", "s", "c"]
    assert texts("org/plain", "train_sft") == ["s"]
    fetched = [path for path in served.requests if "/resolve/" in path]
    assert not any(path.endswith((".png", ".txt")) for path in fetched)


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("org/plain:more", "train", ["c"]),
        ("org/plain:data/train*.jsonl", "train", ["a", "s"]),
        ("org/plain:*.jsonl", "test", ["b", "c"]),
        ("hub:org/plain@main:more/extra.jsonl", "train", ["c"]),
        ("org/cards", "train", ["en first1", "en first2", "en last"]),
        ("org/cards:de", "train", ["de first1", "de first2"]),
        ("org/cards:de", "validation", ["de last"]),
        ("org/cards:hi", "train", ["hi first1", "hi first2", "hi last"]),
    ],
)
def test_subsets_and_patterns(name: str, split: str, expected: list[str], served: fake_hub.FakeHub) -> None:
    assert texts(name, split) == expected
    # Again, with all links there.
    assert texts(name, split) == expected


def test_a_subset_is_read_without_a_connection(
    served: fake_hub.FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts("org/cards:de")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert texts("org/cards:de") == expected
    with pytest.raises(
        UserError, match="the cache does not hold the data set 'org/plain', and HF_HUB_OFFLINE is set"
    ):
        dataset_folder("org/plain")


def test_other_files_of_the_cache_are_not_read(served: fake_hub.FakeHub) -> None:
    assert len(texts("org/cards:hi")) == 3
    assert texts("org/cards:en/l*") == ["en last"]
    assert len(texts("org/cards")) == 3


def test_errors(served: fake_hub.FakeHub, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"org/plain:no: the data set on the hub holds no files 'no'; name a subset"
    ):
        dataset_folder("org/plain:no")
    with pytest.raises(
        UserError, match=r"org/none: no such local path, and the hub has no data set 'org/none'"
    ):
        dataset_folder("org/none")
    (tmp_path / "cards" / "README.md").write_text(CARD.replace("  default: true\n", ""), encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"org/cards: the data set has 3 subsets, and none is its default; name one, as in org/cards:de; "
        "known: de, en, hi",
    ):
        dataset_folder("org/cards")


def test_evaluation_records(served: fake_hub.FakeHub) -> None:
    records = Records(["org/cards:de"], RecordOptions(split="validation"))
    assert [record["text"] for record in records] == ["de last"]
    with pytest.raises(UserError, match=r"its files are of several splits \(train, validation\)"):
        Records(["org/cards:de"], RecordOptions())


def test_cards_without_subsets(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    for text in (
        "",
        "# A title\n",
        "---\nlicense: mit\n---\n",
        "---\nconfigs: de\n---\n",
        "---\nconfigs:\n- 3\n---\n",
    ):
        card.write_text(text)
        assert card_subsets(card) == []
