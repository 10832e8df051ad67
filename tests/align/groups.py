"""Groups for tests of losses."""

from __future__ import annotations

from koine.data.groups import Group


def preferences(probability: float = 1.0) -> Group:
    """A pair."""
    return Group("pair", "en", "pairs", 0, "preferences", probability=probability)


def labelled(*labels: bool) -> Group:
    """A prompt with labelled completions."""
    return Group("labelled", "en", "labels", 0, "labelled", labels=labels)


def scored(*scores: float) -> Group:
    """A prompt with scored completions."""
    return Group("scored", "en", "scores", 0, "scored", scores=scores)
