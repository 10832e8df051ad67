"""Statistics of runs: cross-validated fits, rank correlation, and bootstrap intervals over runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]
DRAWS = 2_000
"""Bootstrap draws."""


@dataclass(frozen=True)
class Estimated:
    """An estimate with its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """Low and high end."""
        return [self.low, self.high]


def bootstrap(
    statistic: Callable[[Index], float],
    runs: int,
    *,
    confidence: float = 0.95,
    draws: int | None = None,
    seed: int = 0,
) -> Estimated:
    """Return a statistic of all runs with its percentile interval over runs drawn with replacement.

    statistic: takes the indices of the runs; draws where it is not finite are left out. draws: None: `DRAWS`.
    """
    generator = np.random.default_rng(seed)
    found = np.array(
        [statistic(generator.integers(0, runs, runs)) for _ in range(DRAWS if draws is None else draws)]
    )
    found = found[np.isfinite(found)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail]) if len(found) else (np.nan, np.nan)
    return Estimated(float(statistic(np.arange(runs))), float(low), float(high))


def _powers(x: Array, degree: int) -> Array:
    """Return 1, z, z^2 ... of the standardised x, `[n, degree + 1]`."""
    spread = x.std()
    z = (x - x.mean()) / (spread if spread > 0 else 1.0)
    return np.stack([z**power for power in range(degree + 1)], axis=1)


def fitted_curve(x: Array, y: Array, degree: int) -> Array:
    """Return the coefficients of 1, z, z^2 ..., z the standardised x, by least squares."""
    return np.asarray(np.linalg.lstsq(_powers(x, degree), y, rcond=None)[0], dtype=np.float64)


def left_out_rmse(x: Array, y: Array, degree: int, index: Index) -> float:
    """Return the RMSE of a polynomial's predictions of points left out of its fit, one run at a time.

    index: the runs, drawn with replacement: all copies of a run are left out together.
    """
    runs, weights = np.unique(index, return_counts=True)
    design, wanted, weight = _powers(x[runs], degree), y[runs], weights.astype(np.float64)
    if len(runs) <= degree + 1:
        return np.nan
    # Normal equations without each run: the whole, less that run's part.
    parts = weight[:, None, None] * design[:, :, None] * design[:, None, :]
    sides = weight[:, None] * design * wanted[:, None]
    left = parts.sum(axis=0) - parts + 1e-9 * np.eye(degree + 1)
    fits = np.linalg.solve(left, (sides.sum(axis=0) - sides)[:, :, None])[:, :, 0]
    errors = wanted - (design * fits).sum(axis=1)
    return float(np.sqrt((weight * errors**2).sum() / weight.sum()))


def quadratic_gain(x: Array, y: Array, index: Index) -> float:
    """Return the share by which a quadratic's left-out RMSE is below a line's; below 0: it is higher."""
    line, curve = (left_out_rmse(x, y, degree, index) for degree in (1, 2))
    return 1 - curve / line if line > 0 else np.nan


def curvature(x: Array, y: Array, index: Index) -> float:
    """Return the coefficient of z^2, z the standardised x; below 0: an inverted U."""
    if len(np.unique(index)) < 4:
        return np.nan
    return float(fitted_curve(x[index], y[index], 2)[2])


def turning_point(x: Array, y: Array) -> float:
    """Return where a quadratic turns, as a share of the range of x: 0 to 1 is inside."""
    _, slope, bend = fitted_curve(x, y, 2)
    if bend == 0 or x.std() == 0:
        return np.nan
    at = x.mean() - slope / (2 * bend) * x.std()
    return float((at - x.min()) / (x.max() - x.min()))


def ranks(values: Array) -> Array:
    """Return ranks from 0, the mean rank for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: Array = (ends - (counts + 1) / 2)[inverse]
    return found


def correlation(x: Array, y: Array) -> float:
    """Return Pearson's correlation; NaN where one is constant."""
    if x.std() == 0 or y.std() == 0:
        return np.nan
    return float(np.corrcoef(x, y)[0, 1])


def rank_correlation(x: Array, y: Array) -> float:
    """Return Spearman's correlation."""
    return correlation(ranks(x), ranks(y))


def break_of(x: Array, y: Array) -> float:
    """Return where a quadratic turns, moved to the middle three fifths of the points."""
    low, high = np.quantile(x, [0.2, 0.8])
    share = turning_point(x, y)
    at = np.median(x) if np.isnan(share) else x.min() + share * (x.max() - x.min())
    return float(np.clip(at, low, high))


def side_slope(x: Array, y: Array, at: float, side: int, index: Index) -> float:
    """Return the least-squares slope of the points below (-1) or above (1) a place; NaN for fewer than three."""
    kept = index[side * (x[index] - at) >= 0]
    if len(np.unique(x[kept])) < 3:
        return np.nan
    return float(np.polyfit(x[kept], y[kept], 1)[0])


def smooth(courses: Array) -> Array:
    """Return each course with the mean of every evaluation and its neighbours, `[runs, evaluations]`."""
    padded = np.pad(courses, ((0, 0), (1, 1)), mode="edge")
    found: Array = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    return found


def peaks(courses: Array) -> Index:
    """Return the evaluation with the highest smoothed value of each run."""
    return np.asarray(smooth(courses).argmax(axis=1), dtype=np.int64)


def gap_gain(first: Array, second: Array, index: Index) -> float:
    """Return the median gap of two steps in the same run, less the median over all pairs of runs.

    Below 0: they are nearer in one run than in runs that have nothing to do with each other.
    """
    one, other = first[index], second[index]
    return float(np.median(np.abs(one - other)) - np.median(np.abs(one[:, None] - other[None, :])))


def shuffled_share(first: Array, second: Array, *, seed: int = 0) -> float:
    """Return the share of shuffles of the runs with a median gap no larger than the real one: a p-value."""
    generator = np.random.default_rng(seed)
    real = np.median(np.abs(first - second))
    gaps = [np.median(np.abs(first - generator.permutation(second))) for _ in range(DRAWS)]
    return float((1 + np.sum(np.array(gaps) <= real)) / (DRAWS + 1))


def slopes(courses: Array) -> Array:
    """Return the least-squares change of each course over the whole training, `[runs]`."""
    at = np.linspace(-0.5, 0.5, courses.shape[1])
    found: Array = (courses * at).sum(axis=1) / (at**2).sum()
    return found


def effect_at_given(x: Array, level: Array, y: Array, index: Index) -> float:
    """Return the change of y from level 0 to level 1 where x is the same: a quadratic in x, and a slope."""
    if len(np.unique(index)) < 5:
        return np.nan
    design = np.column_stack([_powers(x[index], 2), level[index]])
    return float(np.linalg.lstsq(design, y[index], rcond=None)[0][3])
