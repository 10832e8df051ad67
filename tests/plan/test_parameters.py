"""Parameters of plan functions: `--set` by type, bounds and choices, and the table of `--list-parameters`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from koine.errors import UserError
from koine.plan import Parameter, Plan
from koine.plan.loading import make_plan
from koine.plan.parameters import check_parameters, parameter_table, parse_settings


def plan(
    plan: Plan,
    *,
    count: int,
    rate: float = 0.5,
    on: bool = False,
    words: tuple[str, ...] = (),
    pair: tuple[int, float] = (1, 2.0),
    data: Path | None = None,
    limit: int | None = 3,
    kind: Literal["a", "b"] = "a",
) -> None:
    """A plan without descriptions, with every type that a setting can have."""


def described(
    plan: Plan,
    *,
    steps: Annotated[int, Parameter("Training steps of the small model.", unit="steps", low=1)] = 100,
    share: Annotated[float, Parameter("Share of English.", low=0, below=1)] = 0.1,
    rate: Annotated[float | None, Parameter("Learning rate.", above=0)] = None,
    lengths: Annotated[tuple[int, ...], Parameter("Lengths.", unit="tokens", low=2)] = (8, 16),
    method: Annotated[str, Parameter("Method.", choices=("linear", "ties"))] = "linear",
) -> None:
    """A plan whose parameters have descriptions and bounds."""


def checked(function: Any, settings: list[str]) -> dict[str, Any]:
    return check_parameters(function, parse_settings(function, settings))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rate=1e-3", 1e-3),
        ("on=true", True),
        ("on=no", False),
        ("words=de, hi,ja", ("de", "hi", "ja")),
        ("words=", ()),
        ("pair=3,0.25", (3, 0.25)),
        ("data=some/file=1.jsonl", Path("some/file=1.jsonl")),
        ("data=none", None),
        ("limit=none", None),
        ("limit=7", 7),
        ("kind=b", "b"),
    ],
)
def test_values_get_the_type_of_the_parameter(setting: str, value: object) -> None:
    assert checked(plan, ["count=1", setting]) == {"count": 1, setting.partition("=")[0]: value}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["count=1.5"], "--set count: '1.5' does not fit; expected: integer"),
        (["count=1", "on=maybe"], "'maybe' does not fit; expected: true or false"),
        (["count=1", "pair=3"], "'3' does not fit; expected: integer,number"),
        (["count=1", "kind=c"], "'c' does not fit; expected: a, b"),
        (["count=1", "data="], "'' does not fit; expected: path or none"),
        (["count=1", "wrods=x"], "unknown key 'wrods'; did you mean 'words'"),
        (["count=1", "threads=2"], "unknown key 'threads'; it is a setting of the run: --threads N"),
        (["count=1", "count=2"], "given twice"),
        (["count"], "not key=value"),
        ([], "'count' has no default; give it: --set count=INTEGER"),
    ],
)
def test_a_value_that_does_not_fit_is_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        checked(plan, settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=0", "steps is 0; it must be at least 1"),
        ("share=1", "share is 1.0; it must be less than 1"),
        ("share=-0.1", "share is -0.1; it must be at least 0"),
        ("rate=0", "rate is 0.0; it must be greater than 0"),
        ("lengths=8,1", "lengths is 1; it must be at least 2"),
        ("method=tise", "method is 'tise'; did you mean 'ties'?"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(setting: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        checked(described, [setting])
    assert message in str(error.value)
    assert checked(described, ["rate=none", "share=0", "steps=1"]) == {"rate": None, "share": 0.0, "steps": 1}


def test_values_given_in_python_are_checked_and_converted(tmp_path: Path) -> None:
    values = check_parameters(plan, {"count": 1, "data": "text.jsonl", "words": ["de", "hi"]})
    assert values == {"count": 1, "data": Path("text.jsonl"), "words": ("de", "hi")}
    for given, message in (
        ({"count": "1"}, "count is '1'; it must be of type: integer"),
        ({"cuont": 1}, "unknown parameter 'cuont'; did you mean 'count'?"),
    ):
        with pytest.raises(UserError, match=message):
            check_parameters(plan, given)
    with pytest.raises(UserError, match="steps is 0"):
        make_plan(described, {"steps": 0}, runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_table_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = [line.split("  ") for line in parameter_table(described)]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert cells[0] == ["parameter", "default", "unit", "values", "description"]
    assert cells[1] == ["steps", "100", "steps", "integer, at least 1", "Training steps of the small model."]
    assert cells[2] == ["share", "0.1", "number, at least 0, below 1", "Share of English."]
    assert cells[3] == ["rate", "none", "number or none, above 0", "Learning rate."]
    assert cells[4] == ["lengths", "8,16", "tokens", "integer,integer,..., at least 2", "Lengths."]
    assert cells[5] == ["method", "linear", "linear, ties", "Method."]
    bare = parameter_table(plan)
    assert "count      (required)" in bare[1]
    assert "path or none" in bare[6]


def test_a_narrow_terminal_gets_a_list_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert parameter_table(described)[:2] == [
        "steps=100 steps (integer, at least 1)",
        "  Training steps of the small model.",
    ]
