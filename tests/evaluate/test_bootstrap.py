"""Bootstrap intervals against the normal approximation that theory gives for large samples."""

from __future__ import annotations

import numpy as np
import pytest

from koine.evaluate import bootstrap_interval


def test_the_interval_of_a_mean_is_that_of_theory() -> None:
    values = np.random.Generator(np.random.PCG64(0)).normal(3.0, 2.0, size=2000)
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(2000)
    # the quantiles of 4000 resamples scatter by about 3 % of the width
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_a_ratio_of_sums_weighs_units_by_their_size() -> None:
    """Bits per byte that are the same in every document have no spread, however unequal the documents."""
    sizes = np.array([1.0, 10.0, 1000.0])
    assert bootstrap_interval(sizes * 2.5, sizes) == pytest.approx((2.5, 2.5))


def test_blocks_and_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = bootstrap_interval(values, seed=1)
    monkeypatch.setattr("koine.evaluate.bootstrap._BLOCK", 120)
    assert bootstrap_interval(values, seed=1) == whole
    assert bootstrap_interval(values, seed=2) != whole


def test_one_unit_has_no_interval() -> None:
    assert bootstrap_interval([1.0]) is None
