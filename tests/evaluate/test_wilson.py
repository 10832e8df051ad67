"""Wilson score intervals, against published values and against the equation that defines them."""

from __future__ import annotations

import pytest

from koine.evaluate.wilson import effective_count, wilson_interval


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_intervals(right: int, count: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("share", "count"), [(0.1, 7), (0.5, 1), (0.93, 1000.5)])
def test_the_ends_are_as_many_standard_errors_away_as_wanted(
    share: float, count: float, confidence: float
) -> None:
    """The ends p solve (p - share)^2 = z^2 p (1 - p) / n: the definition, in place of the closed form."""
    z = {0.9: 1.6448536, 0.95: 1.9599640, 0.99: 2.5758293}[confidence]
    for end in wilson_interval(share, count, confidence=confidence):
        assert (end - share) ** 2 == pytest.approx(z**2 * end * (1 - end) / count, rel=1e-6)


def test_no_answer_right_is_the_mirror_of_all_right() -> None:
    assert wilson_interval(0.0, 11) == (0.0, pytest.approx(0.2588, abs=5e-5))
    low, high = wilson_interval(1.0, 11)
    assert (1.0 - high, 1.0 - low) == (0.0, pytest.approx(wilson_interval(0.0, 11)[1]))


def test_independent_trials_count_once_each() -> None:
    assert effective_count([True, False, True], ["a", "b", "c"]) == pytest.approx(3.0)


def test_repeated_trials_count_as_one() -> None:
    # Each of four facts is asked in three languages, with the same outcome in all of them.
    right = [True] * 3 + [False] * 9
    assert effective_count(right, [number // 3 for number in range(12)]) == pytest.approx(4.0)
    assert effective_count([False] * 12, [number // 3 for number in range(12)]) == 4.0


def test_trials_that_differ_within_a_cluster_do_not_count_more_than_once() -> None:
    # Every cluster has the mean itself, so the clusters do not vary at all.
    assert effective_count([True, False] * 5, [number // 2 for number in range(10)]) == 10.0


def test_partly_dependent_trials_are_in_between() -> None:
    # By hand: p = 1/2, clusters of 2 with 2, 1, 0, 1 right: sum of (hits - 1)^2 = 2, over 8^2 is 1/32.
    # The variance of independent trials is 1/4 / 8 = 1/32, so nothing is lost. With 2, 2, 0, 0: 4/64 = 1/16.
    assert effective_count([1, 1, 1, 0, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2, 3, 3]) == pytest.approx(8.0)
    assert effective_count([1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]) == pytest.approx(4.0)
