"""Token shards: the same for any number of workers and interruptions, and protected by hashes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from koine.data import TokenSource, tokenize
from koine.errors import UserError
from koine.files import sha256_file
from koine.tokenizer import load_tokenizer
from tests.data.conftest import document, write_records


def records(count: int = 300) -> list[dict[str, str]]:
    return [
        {
            "id": f"r{number}",
            "text": document(number),
            "language": "en" if number % 3 else "de",
            "domain": "river",
        }
        for number in range(count)
    ]


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_records(tmp_path / "some.jsonl", records())


def test_round_trip(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize(source, tokenizer, out=tmp_path / "out", shard_bytes=4000)
    opened, loaded = TokenSource(tmp_path / "out"), load_tokenizer(tokenizer)
    assert len(opened.manifest["shards"]) > 5
    assert len(opened) == 300
    for number, record in enumerate(records()):
        info = opened.info(number)
        assert (info.record_id, info.language, info.domain) == (record["id"], record["language"], "river")
        assert info.bytes == len(record["text"].encode("utf-8"))
        expected = [loaded.bos_id, *loaded.encode(record["text"]), loaded.eos_id]
        assert opened.tokens(number).tolist() == expected
        shard, index = opened.locate(number)
        assert opened.number(shard, index) == number
    totals = opened.totals()
    assert sum(entry["documents"] for entry in totals.values()) == 300
    assert sum(entry["tokens"] for entry in totals.values()) == int(opened.lengths.sum())


def test_chats_have_a_completion_mask(tokenizer: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the river?"}, {"role": "assistant", "content": "to the sea"}]
    path = write_records(tmp_path / "chats.jsonl", [{"messages": messages, "language": "en"}] * 3)
    tokenize(path, tokenizer, out=tmp_path / "out")
    opened, loaded = TokenSource(tmp_path / "out"), load_tokenizer(tokenizer)
    ids, mask = loaded.encode_messages(messages)
    assert opened.chat
    assert opened.tokens(1).tolist() == ids
    assert [bool(value) for value in opened.mask(1)] == mask
    mixed = write_records(tmp_path / "mixed.jsonl", [{"messages": messages}, {"text": "a"}])
    with pytest.raises(UserError, match="both chats"):
        tokenize(mixed, tokenizer, out=tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_any_number_of_workers(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        tokenize(source, tokenizer, out=tmp_path / name, workers=workers, shard_bytes=6000)
    assert content(tmp_path / "one") == content(tmp_path / "two")


PROGRAM = """
import sys, time
from pathlib import Path
from koine.data import tokenization as tokenizing
whole = tokenizing._write_shard
def slowly(*arguments):
    whole(*arguments)
    time.sleep(0.05)
tokenizing._write_shard = slowly
tokenizing.tokenize(Path(sys.argv[1]), Path(sys.argv[2]), out=Path(sys.argv[3]), shard_bytes=2000)
"""


def killed_midway(source: Path, tokenizer: Path, out: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(source), str(tokenizer), str(out)])
    work = out.with_name(f".{out.name}.work")
    deadline = time.monotonic() + 60
    while len(list(work.glob("shard-*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert work.exists()


def test_a_killed_run_continues_to_the_same_bytes(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize(source, tokenizer, out=tmp_path / "whole", shard_bytes=2000)
    killed_midway(source, tokenizer, tmp_path / "killed")
    tokenize(source, tokenizer, out=tmp_path / "killed", shard_bytes=2000)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".killed")] == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def one_token_more(path: Path) -> None:
    """A damaged record that is still valid JSON."""
    about = json.loads(path.read_text())
    about["languages"]["de"][1] += 1
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("shard-00001.tokens", flip),
        ("shard-00001.offsets", cut),
        ("shard-00001.documents.parquet", Path.unlink),
        ("shard-00001.json", cut),
        ("shard-00001.json", one_token_more),
    ],
)
def test_a_damaged_shard_is_written_again(
    name: str, damage: Callable[[Path], None], source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """After a crash of the machine or a full disk, damaged shards are written again."""
    tokenize(source, tokenizer, out=tmp_path / "whole", shard_bytes=2000)
    killed_midway(source, tokenizer, tmp_path / "killed")
    damage(tmp_path / ".killed.work" / name)
    tokenize(source, tokenizer, out=tmp_path / "killed", shard_bytes=2000)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_extra_shards_of_an_interrupted_run_are_removed(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    killed_midway(source, tokenizer, tmp_path / "out")
    write_records(source, records(20))
    tokenize(source, tokenizer, out=tmp_path / "out", shard_bytes=2000)
    assert len(TokenSource(tmp_path / "out")) == 20


def test_bad_input_leaves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 3}\n' * 20)
    with pytest.raises(UserError, match="20 of 20 records are bad"):
        tokenize(path, tokenizer, out=tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("ending", [".tokens", ".offsets", ".documents.parquet"])
def test_a_flipped_byte_is_named(ending: str, source: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize(source, tokenizer, out=tmp_path / "out")
    path = tmp_path / "out" / f"shard-00000{ending}"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"shard-00000{ending}: does not match the sha256"):
        TokenSource(tmp_path / "out")
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="it is truncated or was changed"):
        TokenSource(tmp_path / "out", verify=False)


def test_the_manifest_is_protected_too(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize(source, tokenizer, out=tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["vocab_size"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json: does not match its own sha256"):
        TokenSource(tmp_path / "out")


def test_other_processes_may_rename_files_in_the_folder(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    """Another worker may rename its partial file at any moment; its absence must not stop this worker."""
    from koine.data import tokenization as tokenizing

    # A link to nothing is seen in the folder, and cannot be opened: as a file that has gone.
    (tmp_path / ".shard-00001.json.12345.partial").symlink_to(tmp_path / "gone")
    record = {"text": "one", "language": "de", "domain": "d", "source": "s", "id": "1"}
    tokenizing._write_shard(
        tmp_path, 0, [record], "digest", tokenizing.Encoding(tokenizer, "documents", None)
    )
    assert (tmp_path / "shard-00000.json").exists()
