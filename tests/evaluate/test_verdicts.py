"""Verdicts by hand: Student's interval, both sides of every border, and what several claims come to."""

from __future__ import annotations

import math

import pytest

from koine.evaluate.verdicts import above, below, hypothesis, interval, less, together, within


def test_students_interval() -> None:
    """Of 1, 2, 3: mean 2, deviation 1, t of 2 degrees of freedom 4.303, over the root of 3. Of two values t is 12.706."""
    half = 4.303 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx([2 - half, 2 + half])
    half = 12.706 * math.sqrt(0.5) / math.sqrt(2)
    assert interval([0.0, 1.0]) == pytest.approx([0.5 - half, 0.5 + half])
    assert interval([4.0]) == [4.0, 4.0]


# Three values around a mean with deviation 0.1: the interval is the mean, give or take 0.2484.
def around(mean: float) -> list[float]:
    return [mean - 0.1, mean, mean + 0.1]


@pytest.mark.parametrize(
    ("mean", "least", "verdict"),
    [
        (0.3, 0.0, "reproduced"), (-0.3, 0.0, "not reproduced"), (0.2, 0.0, "inconclusive"), (-0.2, 0.0, "inconclusive"),
        (0.8, 0.5, "reproduced"), (0.7, 0.5, "inconclusive"), (0.2, 0.5, "not reproduced"),
    ],
)  # fmt: skip
def test_above_and_below_are_mirrors(mean: float, least: float, verdict: str) -> None:
    assert above(around(mean), least) == verdict
    assert below(around(-mean), -least) == verdict


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.0, "reproduced"), (0.2, "reproduced"), (-0.2, "reproduced"), (0.4, "inconclusive"), (-0.4, "inconclusive"),
        (0.8, "not reproduced"), (-0.8, "not reproduced"),
    ],
)  # fmt: skip
def test_within_a_margin_on_both_sides(mean: float, verdict: str) -> None:
    assert within(around(mean), 0.5) == verdict


def test_several_claims() -> None:
    assert together(["reproduced", "reproduced"]) == "reproduced"
    assert together(["reproduced", "inconclusive"]) == "inconclusive"
    assert together(["inconclusive", "not reproduced", "reproduced"]) == "not reproduced"
    assert less([3.0, 5.0], [1.0, 6.0]) == [2.0, -1.0]
    one = hypothesis("reproduced", {"first": [1.0, 2.0, 3.0], "second": [9.0]}, "2", "why")
    assert one["measured"] == 2.0
    assert one["interval"] == interval([1.0, 2.0, 3.0])
    assert one["series"]["second"] == {"by_seed": [9.0], "interval": [9.0, 9.0]}
