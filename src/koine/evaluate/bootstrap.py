"""Bootstrap intervals of a ratio of sums, such as bits over bytes or right answers over questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Indices are drawn in blocks of about this size, so that memory does not grow with the data.
_BLOCK = 4_000_000


def bootstrap_interval(
    numerators: Sequence[float] | NDArray[np.float64],
    denominators: Sequence[float] | NDArray[np.float64] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the percentile interval of `sum(numerators) / sum(denominators)` over resampled units.

    The same input and seed give the same interval.

    Args:
        numerators: `[units]`; a unit is a document or a question, resampled with replacement.
        denominators: `[units]`; without them the ratio is the mean.
        confidence: share of the resampled ratios inside the interval.
        resamples: number of resamples.
        seed: of the random generator.

    Returns:
        The lower and the upper end; `None` for fewer than two units, which have no spread.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    units = len(top)
    if units < 2:
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    ratios = np.empty(resamples)
    block = max(1, _BLOCK // units)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(0, units, size=(rows, units))
        ratios[start : start + rows] = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return float(low), float(high)
