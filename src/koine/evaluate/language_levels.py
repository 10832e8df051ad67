"""Say in plain words how well a model serves a language, from the figures of its profile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WELL, PARTLY, POORLY, NOT_AT_ALL, UNKNOWN = "well", "partly", "poorly", "not at all", "not comparable"
LEVELS = (WELL, PARTLY, POORLY, NOT_AT_ALL, UNKNOWN)
"""From best to worst; `UNKNOWN` where the text is not parallel and nothing else decides."""
MOST_BITS = {WELL: 1.6, PARTLY: 2.0}
"""Most bits for the same content, relative to English, of a level."""
MOST_OF_BASELINE = {WELL: 0.5, PARTLY: 0.75}
"""Most of the bits of a code that knows no language, of a level: text of names alone is easy beside English.

Both bounds are a convention of ours. With them Gemma-3-270M serves German and Spanish well, Hindi and Swahili
partly, Yoruba poorly; SmolLM2-135M, a model of English, German partly and Hindi poorly (docs/explanation/log.md).
"""
MOST_UNKNOWN = 0.01
"""A language with a larger share of unknown text is not served at all."""
MANY_TOKENS = 2.0
"""Tokens for the same content, relative to English, that are worth a remark."""
MANY_SPLIT = 0.5
"""Share of letters split over several tokens that is worth a remark."""


def level_of(row: Mapping[str, Any]) -> str:
    """Return the level of a language, one of `LEVELS`.

    row: figures of `koine.evaluate.language_profile.profile_languages`.
    """
    if row["unknown_share"] >= MOST_UNKNOWN or row["baseline_share"] >= 1.0:
        return NOT_AT_ALL
    if row["relative_bits"] is None:
        return UNKNOWN
    for level in (WELL, PARTLY):
        if row["relative_bits"] <= MOST_BITS[level] and row["baseline_share"] <= MOST_OF_BASELINE[level]:
            return level
    return POORLY


def remarks(row: Mapping[str, Any]) -> list[str]:
    """Return what else is worth saying about a language, a few words each; most important first."""
    found = []
    if row["unknown_share"] >= MOST_UNKNOWN:
        found.append(f"{100 * row['unknown_share']:.0f} % of the text is unknown to the tokenizer")
    if row["baseline_share"] >= 1.0:
        found.append("predicted no better than without knowing it")
    if row["split_share"] >= MANY_SPLIT:
        found.append(f"{100 * row['split_share']:.0f} % of letters are split")
    if row["relative_tokens"] is not None and row["relative_tokens"] >= MANY_TOKENS:
        found.append(f"{row['relative_tokens']:.1f} × the tokens")
    return found
