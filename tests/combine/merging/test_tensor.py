"""The figures of a report in closed form, and what chance drops in blocks."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file

from koine.combine.merging import tensor as one_tensor
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.plan import MergePlan
from koine.combine.merging.runner import merge
from koine.combine.merging.tensor import figures_of
from koine.combine.merging.vocabularies import align_vocabularies, tokenizer_source
from koine.errors import UserError
from tests.combine.merge_configs import config_of, tensors


def test_figures_in_closed_form() -> None:
    """Three models around a base: distances relative to its norm, the least cosine of a pair, the share of
    entries with two signs."""
    base = torch.tensor([3.0, 4.0])
    changes = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])]
    with_base = cast(MergePlan, SimpleNamespace(base=object()))
    found = figures_of([*(base + change for change in changes), base], with_base)
    assert found["distance"] == pytest.approx([1 / 5, 2 / 5, math.sqrt(2) / 5], abs=1e-6)
    assert found["cosine"] == pytest.approx(-1 / math.sqrt(2), abs=1e-6)
    assert found["sign_conflicts"] == 0.5
    without = figures_of([base + 1, base - 1], cast(MergePlan, SimpleNamespace(base=None)))
    assert without == {"distance": pytest.approx([math.sqrt(2) / 5] * 2, abs=1e-6)}


def test_chance_is_another_in_each_block_and_for_each_seed(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_tensor, "BLOCK", 32 * 16)
    options: dict[str, Any] = {"options": {"density": 0.5}}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        merge(config_of("dare-linear", models, seed=seed, **options), tmp_path / name)
    one, again, two, base = (
        tensors(path)["model.layers.0.mlp.up_proj.weight"]
        for path in (tmp_path / "one", tmp_path / "again", tmp_path / "two", models["base"])
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    # What neither model keeps is the base's: a quarter of the entries, at other places in each block.
    dropped = (one == base).view(-1, 16, 32)
    assert 0.2 < float(dropped.float().mean()) < 0.3
    assert not torch.equal(dropped[0], dropped[1])


def test_how_rows_meet() -> None:
    """Two models and a base: ids beyond a table, tokens of some, rows of no token."""
    paths = [Path("a"), Path("b"), Path("base")]
    tokens: list[dict[str, int]] = [
        {"x": 0, "y": 1, "z": 2, "w": 3}, {"y": 0, "x": 1, "z": 2}, {"x": 0, "y": 1, "w": 2, "z": 3},
    ]  # fmt: skip
    found = align_vocabularies(paths, tokens, (5, 2, 4), chosen=0, with_base=True)
    assert found.rows == 5
    assert found.shared.tolist() == [0, 1]
    assert [places.tolist() for places in found.places] == [[0, 1], [1, 0], [0, 1]]
    # z lies beyond b's table, w is unknown to b, row 4 has no token: the base is no holder, the chosen model is.
    assert found.alone == ((2, ((0, 2),)), (3, ((0, 3),)), (4, ((0, 4),)))
    of_the_base = align_vocabularies(paths, tokens, (2, 2, 6), chosen=2, with_base=True)
    assert of_the_base.rows == 6
    assert of_the_base.alone == ((2, ((2, 2),)), (3, ((2, 3),)), (4, ((2, 4),)), (5, ((2, 5),)))
    second = align_vocabularies(paths, tokens, (4, 4, 4), chosen=1, with_base=True)
    assert second.alone == ((3, ((1, 3),)),)


def test_whose_tokenizer_is_chosen(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b", "base")]
    assert [
        tokenizer_source(paths, with_base=True, policy=policy)
        for policy in ("", "first", "base", str(paths[1]))
    ] == [0, 0, 2, 1]
    with pytest.raises(UserError, match="there is no base"):
        tokenizer_source(paths, with_base=False, policy="base")


def test_rows_on_both_sides_of_one_that_a_model_lacks(tmp_path: Path) -> None:
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
        method="linear", models=(tmp_path / "a", tmp_path / "b"), weights=(0.5, 0.5), tokenizer=str(tmp_path / "b"), unrelated=True
    )  # fmt: skip
    merge(config, tmp_path / "out")
    got = tensors(tmp_path / "out")["embed_tokens.weight"]
    wanted = [ord("y") + 0.5, sum(map(ord, "new")) + 1.0, ord("x") + 0.5, ord("z") + 0.5]
    assert got[:, 0].tolist() == wanted
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 4


def test_the_sample_prefers_no_column() -> None:
    """A change in one column of 1,024 is seen: the stride of the sample is odd."""
    base = torch.ones(1024, 1024)
    changed = base.clone()
    changed[:, 1] += 1.0
    found = figures_of([changed, base], cast(MergePlan, SimpleNamespace(base=object())))
    # The norm of the change is a thirty-second of the base's.
    assert found["distance"] == [pytest.approx(1 / 32, rel=0.2)]
