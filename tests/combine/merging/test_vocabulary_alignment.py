"""Rows of embeddings are matched by their tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.runner import run_merge
from koine.combine.merging.vocabulary_alignment import align_vocabularies
from tests.combine.merge_configs import tensors


def test_rows_are_aligned_by_token() -> None:
    """Two models and a base: ids beyond a table, tokens of some, rows of no token."""
    paths = [Path("a"), Path("b"), Path("base")]
    tokens: list[dict[str, int]] = [
        {"x": 0, "y": 1, "z": 2, "w": 3},
        {"y": 0, "x": 1, "z": 2},
        {"x": 0, "y": 1, "w": 2, "z": 3},
    ]
    found = align_vocabularies(paths, tokens, (5, 2, 4), source=0, with_base=True)
    assert found.rows == 5
    assert found.shared.tolist() == [0, 1]
    assert [positions.tolist() for positions in found.positions] == [[0, 1], [1, 0], [0, 1]]
    # z lies beyond b's rows, b does not have w, row 4 has no token. The source model holds such rows, not the
    # base.
    assert found.partial == ((2, ((0, 2),)), (3, ((0, 3),)), (4, ((0, 4),)))
    from_base = align_vocabularies(paths, tokens, (2, 2, 6), source=2, with_base=True)
    assert from_base.rows == 6
    assert from_base.partial == ((2, ((2, 2),)), (3, ((2, 3),)), (4, ((2, 4),)), (5, ((2, 5),)))
    second = align_vocabularies(paths, tokens, (4, 4, 4), source=1, with_base=True)
    assert second.partial == ((3, ((1, 3),)),)


def test_rows_around_a_token_that_one_model_lacks(tmp_path: Path) -> None:
    """The second model's vocabulary has a token in the middle: rows before and after it are merged in their
    places, its own stays."""
    vocabularies = {"a": ["x", "y", "z"], "b": ["y", "new", "x", "z"]}
    for name, words in vocabularies.items():
        (tmp_path / name).mkdir()
        rows = torch.tensor([[float(sum(map(ord, word)) + (name == "b"))] * 3 for word in words])
        save_file({"embed_tokens.weight": rows, "norm": torch.ones(5)}, tmp_path / name / "model.safetensors")
        content = {"model": {"vocab": {word: row for row, word in enumerate(words)}}, "added_tokens": []}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / name / "config.json").write_text(json.dumps({"vocab_size": len(words)}))
    config = MergeConfig(
        method="linear",
        models=(tmp_path / "a", tmp_path / "b"),
        weights=(0.5, 0.5),
        tokenizer=str(tmp_path / "b"),
        unrelated=True,
    )
    run_merge(config, tmp_path / "out")
    got = tensors(tmp_path / "out")["embed_tokens.weight"]
    wanted = [ord("y") + 0.5, sum(map(ord, "new")) + 1.0, ord("x") + 0.5, ord("z") + 0.5]
    assert got[:, 0].tolist() == wanted
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 4
