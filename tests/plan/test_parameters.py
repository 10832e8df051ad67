"""`--set` by the types of a plan's parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from koine.errors import UserError
from koine.plan import Plan
from koine.plan.parameters import parse_settings


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
    """Every type that a setting can have."""


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
    assert parse_settings(plan, ["count=1", setting]) == {"count": 1, setting.partition("=")[0]: value}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["count=1.5"], "'1.5' does not fit"),
        (["count=1", "on=maybe"], "'maybe' does not fit"),
        (["count=1", "pair=3"], "'3' does not fit"),
        (["count=1", "kind=c"], "'c' does not fit"),
        (["count=1", "data="], "'' does not fit"),
        (["count=1", "wrods=x"], "unknown key 'wrods'; did you mean 'words'"),
        (["count=1", "count=2"], "given twice"),
        (["count"], "not key=value"),
        ([], "'count' has no default; give it: --set count=INT"),
    ],
)
def test_what_does_not_fit_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_settings(plan, settings)
    assert said in str(error.value)
