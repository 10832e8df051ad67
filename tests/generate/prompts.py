"""Prompts of random ids."""

from __future__ import annotations

import random


def prompt_of(size: int, seed: int) -> list[int]:
    """Return `size` ids that depend on the seed alone."""
    return [random.Random(seed * 1000 + place).randrange(6, 98) for place in range(size)]
