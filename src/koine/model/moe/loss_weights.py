"""Factors of the router losses that each way to upcycle has; declared here once, for the functions, the command and the recipe."""

from __future__ import annotations

from typing import NamedTuple


class RouterLosses(NamedTuple):
    """Factors of the load-balancing loss and of the router's z-loss."""

    load_balancing: float
    z_loss: float


BTX = BAM = RouterLosses(0.01, 0.001)
"""arXiv 2408.08274 has both losses for BAM and for the BTX that it compares with, and names no factor; these are usual ones."""

NEXUS = RouterLosses(0.05, 0.0)
"""arXiv 2408.15901, which mentions no z-loss."""
