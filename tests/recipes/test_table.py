"""The table of recipes, and the description of every parameter."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.plan.parameters import parameter_table, parameters_of
from koine.recipes import RECIPES, find_plan
from tests.plan.running import koine


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_of_a_recipe_is_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = find_plan(name)
    assert inspect.getdoc(function)
    for parameter in parameters_of(function):
        assert parameter.about.description.endswith("."), parameter.name
        if parameter.default is not inspect.Parameter.empty:
            parameter.check(parameter.default)
    for columns in (60, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, parameter_table(function))) <= columns


def test_koine_run_alone_lists_the_recipes(tmp_path: Path) -> None:
    code, out, _ = koine(tmp_path, "run")
    assert code == 0
    *table, hint = out.splitlines()
    assert max(map(len, table)) <= 80
    # The commands of the last line are as long as the path of the installation.
    assert hint.endswith("koine run NAME --list-parameters")
    for name, recipe in RECIPES.items():
        assert f"{name:18}" in out
        assert recipe.summary in out


def test_parameters_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a table; narrow terminals get a list
    code, out, _ = koine(tmp_path, "run", "quickstart", "--list-parameters")
    assert code == 0
    (line,) = [line for line in out.splitlines() if line.startswith("pretrain_steps")]
    assert line.split("  ")[0] == "pretrain_steps"
    assert "300" in line
    assert "integer, at least 1" in line
    assert "Steps of pretraining" in line


def test_a_value_out_of_bounds_ends_before_anything_runs(tmp_path: Path) -> None:
    code, _, err = koine(tmp_path, "run", "quickstart", "--set", "pretrain_steps=0")
    assert (code, err.strip()) == (2, "koine: pretrain_steps is 0; it must be at least 1")
    assert not list(tmp_path.iterdir())


def test_a_module_of_helpers_is_no_recipe() -> None:
    with pytest.raises(UserError, match="unknown recipe 'parameters'"):
        find_plan("parameters")
