"""Merging from Python gives what the configuration gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import koine.combine
from koine.combine import merge, run_merge
from koine.errors import UserError
from tests.combine.merge_configs import config_of, tensors


def test_merge_equals_its_configuration(models: dict[str, Path], tmp_path: Path) -> None:
    report = merge(
        [models["a"], models["b"]],
        out=tmp_path / "one",
        method="ties",
        base=models["base"],
        weights=[0.25, 0.75],
        weights_for={"*.mlp.*": [1.0, 0.0]},
        density=0.5,
    )
    config = config_of("ties", models, options={"density": 0.5}, weights_for=(("*.mlp.*", (1.0, 0.0)),))
    assert report == run_merge(config, tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_weights_are_equal_by_default(models: dict[str, Path], tmp_path: Path) -> None:
    merge([str(models["a"]), str(models["b"])], str(tmp_path / "out"))
    a, b, out = (tensors(path)["model.norm.weight"] for path in (models["a"], models["b"], tmp_path / "out"))
    assert torch.allclose(out, (a + b) / 2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": "tiez"}, "unknown method 'tiez'; did you mean 'ties'"),
        ({"density": 0.5}, "linear has no option 'density'"),
        ({"normalize": 1.0}, "normalize is 1.0; it must be true or false"),
        ({"method": "slerp", "t": "0.5"}, "t is '0.5'; it must be a number"),
    ],
)
def test_mistakes_are_named(
    models: dict[str, Path], tmp_path: Path, more: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        merge([models["a"], models["b"]], tmp_path / "out", **more)  # type: ignore[arg-type]


def test_every_exported_name_can_be_imported() -> None:
    for package in (koine.combine, koine.combine.merging):
        assert {"merge", "MergeConfig", "run_merge"} <= set(package.__all__)
        for name in package.__all__:
            getattr(package, name)
