"""Wilson score intervals of shares, such as right answers over questions.

    centre = (p + z^2 / 2n) / (1 + z^2 / n)
    half   = z / (1 + z^2 / n) * sqrt(p (1 - p) / n + z^2 / 4n^2)

Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
Where several answers depend on one fact, n is the effective sample size n / deff, as in E. L. Korn and
B. I. Graubard, "Confidence intervals for proportions with small expected number of positive counts", Survey
Methodology 24 (1998).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist


def wilson_interval(share: float, count: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `count` independent trials.

    It never leaves [0, 1], and it has a width at a share of 0 or 1 too. `count` is above 0 and need not be
    whole.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2.0)
    ratio = z * z / count
    centre = (share + ratio / 2.0) / (1.0 + ratio)
    half = math.sqrt(share * (1.0 - share) * ratio + ratio * ratio / 4.0) / (1.0 + ratio)
    # The ends are exactly 0 and 1 there; rounding must not cross them.
    low = 0.0 if share == 0.0 else max(0.0, centre - half)
    high = 1.0 if share == 1.0 else min(1.0, centre + half)
    return low, high


def effective_count(right: Sequence[bool], clusters: Sequence[Hashable]) -> float:
    """Return how many independent trials are worth the same as trials that depend on each other in clusters.

    It is n / deff. The design effect deff is the variance of the share between clusters, divided by that of
    as many independent trials; it is at least 1. Where all trials agree there is no variance, and each
    cluster counts once.

    Args:
        right: outcome of each trial.
        clusters: what each trial depends on, such as the fact that a question asks for.
    """
    count = len(right)
    share = sum(right) / count
    sums: dict[Hashable, tuple[int, int]] = {}
    for outcome, cluster in zip(right, clusters, strict=True):
        hits, trials = sums.get(cluster, (0, 0))
        sums[cluster] = (hits + outcome, trials + 1)
    if share in (0.0, 1.0):
        return float(len(sums))
    between = sum((hits - share * trials) ** 2 for hits, trials in sums.values()) / count**2
    return count / max(1.0, between / (share * (1.0 - share) / count))
