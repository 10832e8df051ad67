"""Verdicts from differences over seeds: reproduced, not reproduced, or inconclusive.

A verdict is inconclusive where the interval contains the border.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CONFIDENCE = 0.95


def student_probability(t: float, degrees: int) -> float:
    """Return P(|T| < t) of Student's t with `degrees` degrees of freedom.

    Source: Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2 == 1
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(2 if odd else 1, degrees, 2):
        total += term
        term *= k / (k + 1) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


@functools.cache
def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the t for which P(|T| < t) is `confidence`, for any positive number of degrees of freedom."""
    low, high = 0.0, 1.0
    while student_probability(high, degrees) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if student_probability(middle, degrees) < confidence:
            low = middle
        else:
            high = middle
    return high


def interval(values: Sequence[float]) -> list[float]:
    """Return Student's 95 % interval of the mean; of one value, the value itself twice.

    Raises `ValueError` where there is no value, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"an interval needs finite values, one or more: {list(values)}")
    mean, half = statistics.mean(values), 0.0
    if len(values) > 1:
        half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def above(values: Sequence[float], least: float = 0.0) -> str:
    """Judge the claim "above `least`"; a single seed is inconclusive, as it has no spread."""
    low, high = interval(values)
    if len(values) == 1:
        return "inconclusive"
    return "reproduced" if low > least else "not reproduced" if high < least else "inconclusive"


def below(values: Sequence[float], most: float = 0.0) -> str:
    """Judge the claim "below `most`"."""
    return above([-value for value in values], -most)


def within(values: Sequence[float], margin: float) -> str:
    """Judge the claim "no further from 0 than `margin`"."""
    low, high = interval(values)
    if len(values) == 1:
        return "inconclusive"
    if -margin <= low and high <= margin:
        return "reproduced"
    return "not reproduced" if low > margin or high < -margin else "inconclusive"


def combine_verdicts(verdicts: Iterable[str]) -> str:
    """Judge several claims at once: all must hold, and one that fails decides."""
    found = set(verdicts)
    if "not reproduced" in found:
        return "not reproduced"
    return "inconclusive" if "inconclusive" in found else "reproduced"


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the first minus the second, seed by seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def hypothesis(verdict: str, measured: Mapping[str, Sequence[float]], paper: str, why: str) -> dict[str, Any]:
    """Return the entry of one hypothesis in results.json.

    measured: named series, one value a seed; the first is the headline.
    """
    first = next(iter(measured.values()))
    return {
        "verdict": verdict,
        "measured": statistics.mean(first),
        "interval": interval(first),
        "series": {
            name: {"by_seed": list(values), "interval": interval(values)} for name, values in measured.items()
        },
        "paper": paper,
        "why": why,
    }


def estimated(
    verdict: str, series: Mapping[str, tuple[float, Sequence[float]]], paper: str, why: str
) -> dict[str, Any]:
    """Return the entry of a hypothesis whose unit is the run: estimates over all runs, with their intervals.

    series: name -> value and interval; the first is the headline. Without any nothing could be measured.
    """
    value, ends = next(iter(series.values()), (None, None))
    return {
        "verdict": verdict,
        "measured": value,
        "interval": ends,
        "series": {
            name: {"by_seed": [one], "interval": list(found)} for name, (one, found) in series.items()
        },
        "paper": paper,
        "why": why,
    }


def verdict_blocks(hypotheses: Mapping[str, Mapping[str, Any]], digits: int = 3) -> list[dict[str, Any]]:
    """Return report blocks: the number of reproduced hypotheses, and a table of all."""
    by_verdict: dict[str, list[str]] = {}
    for name, one in hypotheses.items():
        by_verdict.setdefault(one["verdict"], []).append(name)
    text = "; ".join(f"{verdict}: {', '.join(names)}" for verdict, names in sorted(by_verdict.items()))
    rows = [
        [name, one["verdict"], _signed(one["measured"], digits), one["why"]]
        for name, one in hypotheses.items()
    ]
    title = f"{len(by_verdict.get('reproduced', []))} of {len(hypotheses)} hypotheses reproduced"
    return [
        {"kind": "verdict", "title": title, "text": text},
        {
            "kind": "table",
            "title": "Hypotheses",
            "columns": ["", "verdict", "measured", "why"],
            "rows": rows,
        },
    ]


def _signed(value: float | None, digits: int) -> str:
    """Format a number with its sign; a dash where nothing was measured."""
    return "–" if value is None else f"{value:+.{digits}f}"


def verdict_markdown(hypotheses: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of verdicts in Markdown: every series with its mean over seeds and interval."""
    lines = ["| id | verdict | measured, mean over seeds (95 % interval) | paper |", "|---|---|---|---|"]
    for name, one in hypotheses.items():
        parts = [
            f"{label}: {statistics.mean(series['by_seed']):+.3f} "
            f"({series['interval'][0]:+.3f} to {series['interval'][1]:+.3f})"
            for label, series in one["series"].items()
        ]
        lines.append(f"| {name} | {one['verdict']} | {'; '.join(parts) or '–'} | {one['paper']} |")
    return "\n".join(lines) + "\n"
