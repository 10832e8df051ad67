"""Sampling settings are validated where they are built, and one class holds them for all engines."""

from __future__ import annotations

import json

import pytest

import koine.generate
from koine.errors import UserError
from koine.generate.sampling import Sampling


def test_there_is_one_class() -> None:
    from koine.generate import token_sampling

    assert koine.generate.Sampling is Sampling
    assert token_sampling.Sampling is Sampling  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("temperature", -0.1, "temperature is -0.1; it must be at least 0"),
        ("temperature", float("nan"), "temperature is nan; it must be a number"),
        ("temperature", float("inf"), "temperature is inf; it must be finite"),
        ("top_k", -1, "top-k is -1; it must be at least 0"),
        ("top_p", 0.0, "top-p is 0.0; it must be greater than 0"),
        ("min_p", 1.1, "min-p is 1.1; it must be at most 1"),
        ("repetition_penalty", 0.0, "repetition-penalty is 0.0; it must be greater than 0"),
        ("seed", -1, "seed is -1; it must be at least 0"),
        ("max_new_tokens", 0, "max-new-tokens is 0; it must be at least 1"),
        ("max_new_tokens", 10**30, f"max-new-tokens is {10**30}; it must be at most 2147483647"),
        ("max_new_tokens", 5.0, "max-new-tokens is 5.0; it must be an integer"),
        ("max_new_tokens", True, "max-new-tokens is True; it must be an integer"),
        ("max_new_tokens", "5", "max-new-tokens is '5'; it must be an integer"),
        ("max_new_tokens", None, "max-new-tokens is None; it must be an integer"),
        ("temperature", True, "temperature is True; it must be a number"),
        ("temperature", "0.3", "temperature is '0.3'; it must be a number"),
        ("temperature", 10**400, "temperature is an integer of 401 digits; it must be finite"),
        ("top_k", 2**31, f"top-k is {2**31}; it must be at most 2147483647"),
        ("top_k", float("nan"), "top-k is nan; it must be an integer"),
        ("min_p", float("nan"), "min-p is nan; it must be a number"),
        ("min_p", [0.1], "min-p is [0.1]; it must be a number"),
        ("seed", False, "seed is False; it must be an integer"),
        ("stop", (5,), "stop is (5,); it must be a tuple of strings, none of them empty"),
        ("stop", "end", "stop is 'end'; it must be a tuple of strings, none of them empty"),
    ],
)
def test_a_setting_out_of_range_is_refused(name: str, value: float, line: str) -> None:
    with pytest.raises(UserError) as error:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert str(error.value) == line


def test_a_setting_can_be_changed_from_text() -> None:
    sampling = Sampling().replaced("temperature", "0.5").replaced("top-k", "40").replaced("seed", "7")
    assert (sampling.temperature, sampling.top_k, sampling.seed) == (0.5, 40, 7)
    assert sampling.replaced("seed", "none").seed is None
    with pytest.raises(UserError, match="unknown setting 'temprature'; did you mean 'temperature'"):
        sampling.replaced("temprature", "1")
    with pytest.raises(UserError, match=r"top-k is '1\.5'; it must be an integer"):
        sampling.replaced("top-k", "1.5")
    with pytest.raises(UserError, match=r"top-p is 2\.0"):
        sampling.replaced("top-p", "2.0")


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "seed", "max_new_tokens"])
def test_an_integer_of_thousands_of_digits_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is an integer of 5001 digits; it must be "):
        Sampling(**{name: 10**5000})


def test_numpy_numbers_are_accepted() -> None:
    import numpy as np

    drawn = Sampling(temperature=np.float32(0.5), top_k=np.int64(7), seed=np.uint8(3))  # type: ignore[arg-type]
    assert json.dumps([drawn.temperature, drawn.top_k, drawn.seed]) == "[0.5, 7, 3]"
    # The keys of cached responses hold it: 0 is written 0.
    assert json.dumps(Sampling(temperature=0).temperature) == "0"


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} is {value}; it must be"):
        Sampling(**{name: value})


def test_each_prompt_gets_its_own_seed() -> None:
    assert [one.seed for one in Sampling(seed=5).per_prompt(3)] == [5, 6, 7]
    drawn = [one.seed for one in Sampling().per_prompt(2)]
    assert drawn[0] is not None
    assert drawn[1] == drawn[0] + 1
    assert Sampling().per_prompt(1) != Sampling().per_prompt(1)
