"""A merge method is one function: options, bounds and the command line follow from its signature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from koine.cli.merge.methods import merge as group
from koine.combine import merge
from koine.combine.merging.method_registry import METHODS, Option, merge_method
from koine.errors import UserError
from tests.combine.merge_configs import tensors


@pytest.fixture
def attract() -> Iterator[None]:
    """Register a method as a user would."""

    @merge_method(source="this test", elementwise=True, models=(2, 2))
    def attract(
        tensors: Sequence[Tensor],
        *,
        t: Annotated[float, Option("Distance below which the second model counts.", above=0.0)],
        signed: Annotated[bool, Option("Keep the sign.")] = True,
        plain: float = 1.0,
    ) -> Tensor:
        """Take entries of the second model where they are near the first's."""
        first, second = tensors
        weight = (t / (first - second).abs()).nan_to_num(1.0, posinf=1.0).clamp(max=1.0)
        return first + weight * (second - first)

    yield
    del METHODS["attract"]


@pytest.mark.usefixtures("attract")
def test_a_method_is_one_annotated_function(models: dict[str, Path], tmp_path: Path) -> None:
    method = METHODS["attract"]
    assert list(method.options) == ["t", "signed", "plain"]
    assert method.options["t"].above == 0.0
    assert method.options["plain"] == Option()
    shown = CliRunner().invoke(group, ["attract", "--help"]).output
    for text in ("Distance below which", "--signed / --no-signed", "Source: this test"):
        assert text in shown
    arguments = ["attract", str(models["a"]), str(models["b"]), "--t", "1e9", "--out", str(tmp_path / "cli")]
    assert CliRunner().invoke(group, arguments, catch_exceptions=False).exit_code == 0
    merge([models["a"], models["b"]], tmp_path / "api", method="attract", t=1e9)
    second = tensors(models["b"])
    for folder in ("cli", "api"):
        for name, tensor in tensors(tmp_path / folder).items():
            assert torch.allclose(tensor, second[name], atol=1e-6)


@pytest.mark.usefixtures("attract")
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "attract needs --t"),
        ({"t": 0.0}, "t is 0.0; it must be greater than 0"),
        ({"t": 1e31}, "t is 1e\\+31; it must be at most 1e\\+30"),
        ({"t": 1.0, "signed": 1.0}, "signed is 1.0; it must be true or false"),
        ({"t": 1.0, "sined": True}, "no option 'sined'; did you mean 'signed'"),
    ],
)
def test_options_are_checked(options: dict[str, float | bool], says: str) -> None:
    with pytest.raises(UserError, match=says):
        METHODS["attract"].check_options(options)


@pytest.mark.usefixtures("attract")
def test_options_are_read_from_text() -> None:
    method = METHODS["attract"]
    assert method.parse_options(["t=0.5", "signed=false"]) == {"t": 0.5, "signed": False}
    for text, says in (
        ("t=half", "it must be a number"),
        ("signed=0.5", "true or false"),
        ("u=1", "no option 'u'"),
    ):
        with pytest.raises(UserError, match=says):
            method.parse_options([text])


def test_all_methods_describe_their_options() -> None:
    for method in METHODS.values():
        assert all(option.help for option in method.options.values())
