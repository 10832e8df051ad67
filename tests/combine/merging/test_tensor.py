"""The report's figures in closed form, and random dropping in blocks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from koine.combine.merging import tensor as tensor_module
from koine.combine.merging.runner import run_merge
from koine.combine.merging.tensor import difference_figures
from tests.combine.merge_configs import config_of, tensors


def test_figures_in_closed_form() -> None:
    """Three models around a base: relative distances, least cosine, share of entries with two signs."""
    base = torch.tensor([3.0, 4.0])
    changes = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 1.0])]
    found = difference_figures([*(base + change for change in changes), base], has_base=True)
    assert found["distance"] == pytest.approx([1 / 5, 2 / 5, math.sqrt(2) / 5], abs=1e-6)
    assert found["cosine"] == pytest.approx(-1 / math.sqrt(2), abs=1e-6)
    assert found["sign_conflicts"] == 0.5
    without = difference_figures([base + 1, base - 1], has_base=False)
    assert without == {"distance": pytest.approx([math.sqrt(2) / 5] * 2, abs=1e-6)}


def test_dropped_entries_differ_between_blocks_and_seeds(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_module, "BLOCK", 32 * 16)
    options: dict[str, Any] = {"options": {"density": 0.5}}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        run_merge(config_of("dare-linear", models, seed=seed, **options), tmp_path / name)
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


def test_the_sample_prefers_no_column() -> None:
    """A change in one column of 1,024 is seen: the stride of the sample is odd."""
    base = torch.ones(1024, 1024)
    changed = base.clone()
    changed[:, 1] += 1.0
    found = difference_figures([changed, base], has_base=True)
    # The norm of the change is a thirty-second of the base's.
    assert found["distance"] == [pytest.approx(1 / 32, rel=0.2)]
