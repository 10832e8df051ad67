"""Typed fields: nothing is converted, and every refusal names the field, its value and what it must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from koine.errors import UserError
from koine.fields import (
    MAX_INTEGER,
    Fields,
    check_boolean,
    check_choice,
    check_dataclass,
    check_file_name,
    check_integer,
    check_number,
    checked_field,
    short_repr,
)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_integer("n", True), "n is True; it must be an integer"),
        (lambda: check_integer("n", 1.0), "n is 1.0; it must be an integer"),
        (lambda: check_integer("n", 0, low=1), "n is 0; it must be at least 1"),
        (lambda: check_integer("n", MAX_INTEGER + 1), f"it must be at most {MAX_INTEGER}"),
        (lambda: check_number("x", "1"), "x is '1'; it must be a number"),
        (lambda: check_number("x", math.nan), "x is nan; it must be a number"),
        (lambda: check_number("x", math.inf), "x is inf; it must be finite"),
        (lambda: check_number("x", 10**400), "it must be finite"),
        (lambda: check_number("x", 0, above=0), "x is 0; it must be greater than 0"),
        (lambda: check_boolean("b", 1), "b is 1; it must be true or false"),
        (lambda: check_choice("c", "cosin", ("cosine", "linear")), "did you mean 'cosine'"),
        (lambda: check_file_name("f", "../x"), "it must be the name of a file in the same folder"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        check()
    assert message in str(error.value)


def test_values_that_fit_come_back() -> None:
    assert check_integer("n", 3, low=3, high=3) == 3
    number = check_number("x", 2)
    assert number == 2.0
    assert isinstance(number, float)


def test_fields_of_an_object() -> None:
    fields = Fields(
        {"n": 2, "none": None, "inner": {"x": 0.5}, "list": [1]}, "a.json", hint_if_broken="again"
    )
    assert fields.integer("n") == 2
    assert fields.integer("none", 7) == 7
    assert fields.inner("inner").number("x") == 0.5
    assert fields.entries("list") == [1]
    for wrong, message in (
        (lambda: fields.integer("missing"), "a.json: the field 'missing' is missing; again"),
        (lambda: fields.text("n"), "a.json: the field 'n' is 2; it must be a string"),
        (lambda: fields.inner("list"), "it must be an object"),
        (
            lambda: fields.check_known(("n", "none", "inner", "lists")),
            "unknown key 'list'; did you mean 'lists'",
        ),
        (lambda: Fields([], "a.json"), "a.json: is not a JSON object"),
    ):
        with pytest.raises(UserError) as error:
            wrong()
        assert message in str(error.value)


def test_a_dataclass_is_checked_by_its_types_and_bounds() -> None:
    @dataclass(frozen=True)
    class Settings:
        rate: float = checked_field(1.0, "Rate.", above=0)
        steps: int = checked_field(1, "Steps.", low=1)
        schedule: Literal["cosine", "linear"] = checked_field("cosine", "Schedule.")

        __post_init__ = check_dataclass

    assert isinstance(Settings(rate=2).rate, float)
    for given, message in (
        ({"rate": 0}, "rate is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": True}, "steps is True"),
        ({"schedule": "lineer"}, "did you mean 'linear'"),
    ):
        with pytest.raises(UserError, match=message):
            Settings(**given)  # type: ignore[arg-type]


def test_a_long_value_is_shown_shortly() -> None:
    assert len(short_repr("x" * 1000)) == 60
    assert short_repr(10**5000) == "an integer of 5001 digits"
    assert short_repr(list(range(100))) == "a list of 100 entries"
