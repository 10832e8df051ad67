"""Verdicts over any number of seeds, against published quantiles of Student's t."""

from __future__ import annotations

import math

import pytest

from experiments.common.hypotheses import (
    above,
    below,
    combine_verdicts,
    differences,
    hypothesis,
    interval,
    student_quantile,
    within,
)

# Two-sided 95 % quantiles as any statistics book prints them (three decimals).
PUBLISHED = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    7: 2.365,
    8: 2.306,
    9: 2.262,
    10: 2.228,
    11: 2.201,
    14: 2.145,
    15: 2.131,
    19: 2.093,
    24: 2.064,
    29: 2.045,
    39: 2.023,
    60: 2.000,
    120: 1.980,
}


@pytest.mark.parametrize(("degrees", "published"), PUBLISHED.items())
def test_quantiles_are_the_published_ones(degrees: int, published: float) -> None:
    assert student_quantile(degrees) == pytest.approx(published, abs=5.1e-4)


def test_the_quantile_ends_at_the_normal_distributions() -> None:
    assert student_quantile(100_000) == pytest.approx(1.959964, abs=5e-5)


@pytest.mark.parametrize("seeds", [2, 3, 8, 11, 12, 40])
def test_an_interval_of_any_number_of_seeds(seeds: int) -> None:
    # Of 0, 1, 0, 1, ... the mean and the deviation can be worked out by hand.
    values = [float(index % 2) for index in range(seeds)]
    mean = (seeds // 2) / seeds
    deviation = math.sqrt(seeds * mean * (1 - mean) / (seeds - 1))
    half = student_quantile(seeds - 1) * deviation / math.sqrt(seeds)
    assert interval(values) == pytest.approx([mean - half, mean + half])


def test_one_seed_decides_nothing() -> None:
    assert interval([0.5]) == [0.5, 0.5]
    assert {above([0.5]), below([0.5]), within([0.0], 1.0)} == {"inconclusive"}


@pytest.mark.parametrize("values", [[], [math.nan, 1.0], [1.0, math.inf]])
def test_values_that_are_no_measure_are_no_verdict(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        above(values)


# Three values around a mean with deviation 0.1: the interval is the mean, give or take 0.2484.
def around(mean: float) -> list[float]:
    return [mean - 0.1, mean, mean + 0.1]


@pytest.mark.parametrize(
    ("mean", "least", "verdict"),
    [
        (0.3, 0.0, "reproduced"),
        (-0.3, 0.0, "not reproduced"),
        (0.2, 0.0, "inconclusive"),
        (-0.2, 0.0, "inconclusive"),
        (0.8, 0.5, "reproduced"),
        (0.7, 0.5, "inconclusive"),
        (0.2, 0.5, "not reproduced"),
    ],
)
def test_above_and_below_are_mirrors(mean: float, least: float, verdict: str) -> None:
    assert above(around(mean), least) == verdict
    assert below(around(-mean), -least) == verdict


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.0, "reproduced"),
        (0.2, "reproduced"),
        (-0.2, "reproduced"),
        (0.4, "inconclusive"),
        (-0.4, "inconclusive"),
        (0.8, "not reproduced"),
        (-0.8, "not reproduced"),
    ],
)
def test_within_a_margin_on_both_sides(mean: float, verdict: str) -> None:
    assert within(around(mean), 0.5) == verdict


def test_several_claims() -> None:
    assert combine_verdicts(["reproduced", "reproduced"]) == "reproduced"
    assert combine_verdicts(["reproduced", "inconclusive"]) == "inconclusive"
    assert combine_verdicts(["inconclusive", "not reproduced", "reproduced"]) == "not reproduced"
    assert differences([3.0, 5.0], [1.0, 6.0]) == [2.0, -1.0]
    one = hypothesis("reproduced", {"first": [1.0, 2.0, 3.0], "second": [9.0]}, "2", "why")
    assert one["measured"] == 2.0
    assert one["interval"] == interval([1.0, 2.0, 3.0])
    assert one["series"]["second"] == {"by_seed": [9.0], "interval": [9.0, 9.0]}
