"""Take turns: every side works for a moment, again and again, with a probe of the machine beside each turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SLOW_PROBE = 0.8
"""A round is dropped where a probe ran below this share of the median probe."""
FEWEST = 3
"""Rounds that must remain; where fewer are quiet, all are kept."""


class Turn(NamedTuple):
    """One side's turn."""

    seconds: float
    slow: float
    """The slower of the probes right before and after, in the probe's unit."""
    fast: float
    """The faster one: the ceiling of this turn."""


Round = Mapping[str, Turn]


def take_turns(
    sides: Mapping[str, Callable[[], float]], rounds: int, probe: Callable[[], float]
) -> list[Round]:
    """Let each side work once a round; a side returns the seconds of what is compared."""
    found: list[Round] = []
    for _ in range(rounds):
        turns = {}
        for name, work in sides.items():
            before = probe()
            seconds = work()
            after = probe()
            turns[name] = Turn(seconds, min(before, after), max(before, after))
        found.append(turns)
    return found


def quiet_rounds(rounds: list[Round]) -> list[Round]:
    """Drop the rounds in which another process took the machine."""
    usual = statistics.median(turn.slow for one in rounds for turn in one.values())
    quiet = [one for one in rounds if all(turn.slow >= SLOW_PROBE * usual for turn in one.values())]
    return quiet if len(quiet) >= FEWEST else rounds


def compare_sides(rounds: list[Round], ours: str = "ours") -> dict[str, Any]:
    """Return each side's median seconds and ceiling, and each peer's ratio of times to ours with its spread."""
    kept = quiet_rounds(rounds)
    names = list(rounds[0])
    result: dict[str, Any] = {
        "rounds": len(rounds),
        "kept": len(kept),
        "seconds": {name: statistics.median(one[name].seconds for one in kept) for name in names},
        "ceiling": {name: statistics.median(one[name].fast for one in kept) for name in names},
        "ratio": {},
    }
    for name in names:
        if name != ours and ours in names:
            ratios = sorted(one[name].seconds / one[ours].seconds for one in kept)
            result["ratio"][name] = [statistics.median(ratios), ratios[0], ratios[-1]]
    return result
