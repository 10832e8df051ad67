"""Factors of the router losses for each way to upcycle, for the functions, the command and the recipe."""

from __future__ import annotations

from typing import NamedTuple


class RouterLosses(NamedTuple):
    """Factors of the load-balancing loss and of the router z-loss."""

    load_balancing: float
    z_loss: float


BTX = BAM = RouterLosses(0.01, 0.001)
"""arXiv 2408.08274 uses both losses for BAM and for the BTX that it compares with, and names no factors.

These are usual ones.
"""

NEXUS = RouterLosses(0.05, 0.0)
"""arXiv 2408.15901, which mentions no z-loss."""
