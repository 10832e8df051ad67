"""A resumed merge trusts its journal only for bytes with the right checksum, and ends as a fresh one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koine.combine.merging import runner as merging
from koine.combine.merging.runner import run_merge
from tests.combine.merge_configs import config_of, tensors

DONE = 17
"""Tensors, of 34, after which the merge is interrupted."""


def _shards(work: Path) -> list[Path]:
    return sorted(work.glob("*.safetensors"))


def _change(work: Path, change: Callable[[bytes], bytes], which: str = "*.safetensors") -> None:
    for path in work.glob(which):
        path.write_bytes(change(path.read_bytes()))


def _flip(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 0x10
    return bytes(changed)


def _invent(work: Path, entry: Any) -> None:
    names = [
        name
        for path in _shards(work)
        for name in json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
        if name != "__metadata__"
    ]
    with (work / "journal.jsonl").open("a") as file:
        file.write(json.dumps(dict.fromkeys(names, entry)) + "\n")


def _figures(content: bytes) -> bytes:
    return content.replace(b'"distance": [0', b'"distance": [9')


DAMAGES: dict[str, Callable[[Path], None]] = {
    "nothing": lambda work: None,
    "a shard is gone": lambda work: _shards(work)[0].unlink(),
    "all shards are gone": lambda work: [path.unlink() for path in _shards(work)] and None,
    "shards are cut": lambda work: _change(work, lambda content: content[:200]),
    "a shard is empty": lambda work: _shards(work)[-1].write_bytes(b"") and None,
    "shards are zeros": lambda work: _change(work, lambda content: bytes(len(content))),
    "a bit has changed at the end": lambda work: _change(work, lambda content: _flip(content, -5)),
    "a bit has changed in the header": lambda work: _change(work, lambda content: _flip(content, 20)),
    "the index is gone": lambda work: (work / "model.safetensors.index.json").unlink(),
    "the journal is gone": lambda work: (work / "journal.jsonl").unlink(),
    "the journal is empty": lambda work: (work / "journal.jsonl").write_bytes(b"") and None,
    "half a line": lambda work: _change(work, lambda content: content[:-9], "journal.jsonl"),
    "zeros in the journal": lambda work: _change(work, lambda content: content + bytes(99), "journal.jsonl"),
    "deep nesting in the journal": lambda work: _change(
        work, lambda content: content + b"[" * 10**5 + b"\n", "journal.jsonl"
    ),
    "a list in the journal": lambda work: _change(work, lambda content: content + b"[1]\n", "journal.jsonl"),
    "entries are invented": lambda work: _invent(work, {"figures": {}, "seal": 0}),
    "entries of an old version": lambda work: _invent(work, {"distance": [0.1, 0.2]}),
    "entries of another kind": lambda work: _invent(work, 3),
    "figures are edited": lambda work: _change(work, _figures, "journal.jsonl"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_work_is_repeated(
    damage: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "SYNC_BYTES", 1)
    real, left, again = merging.merge_tensor, iter(range(DONE)), list[str]()

    def some(*given: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    def counted(job: Any, writer: Any) -> Any:
        again.append(job.name)
        return real(job, writer)

    config = config_of("linear", models, max_shard_bytes=10_000)
    monkeypatch.setattr(merging, "merge_tensor", some)
    with pytest.raises(KeyboardInterrupt):
        run_merge(config, tmp_path / "out", threads=1)
    DAMAGES[damage](tmp_path / ".out.merge")
    monkeypatch.setattr(merging, "merge_tensor", counted)
    run_merge(config, tmp_path / "out", threads=1)
    count = len(again)
    run_merge(config, tmp_path / "fresh", threads=1)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == kept
    total = len(tensors(tmp_path / "fresh"))
    # Only damaged tensors are merged again, each once.
    assert total - DONE <= count <= total
    if damage in (
        "nothing",
        "the index is gone",
        "a bit has changed in the header",
        "entries of another kind",
    ):
        wanted = total if damage == "entries of another kind" else total - DONE
        assert count == wanted
    if damage == "all shards are gone":
        assert count == total


def test_a_merge_by_token_is_resumed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows written out of order are read back for their checksum."""
    from tests.combine.merging.test_plan import _permute_vocabulary

    _permute_vocabulary(models["b"])
    monkeypatch.setattr(merging, "SYNC_BYTES", 1)
    real, left = merging.merge_tensor, iter(range(DONE))

    def some(*given: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*given)

    config = config_of("linear", models, tokenizer=str(models["b"]))
    monkeypatch.setattr(merging, "merge_tensor", some)
    with pytest.raises(KeyboardInterrupt):
        run_merge(config, tmp_path / "out", threads=1)
    touched: list[str] = []
    monkeypatch.setattr(
        merging,
        "merge_tensor",
        lambda job, writer: (touched.append(job.name), real(job, writer))[1],
    )
    run_merge(config, tmp_path / "out", threads=1)
    assert len(touched) == len(tensors(tmp_path / "out")) - DONE
    run_merge(config, tmp_path / "fresh")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "fresh"))
    assert first == second
