"""Checkpoints combined: upcycled to a mixture of experts, and extended by one more. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.combine.domains import domain_embedding, fit_encoder, load_encoder
    from koine.combine.extend import add_expert, remove_expert
    from koine.combine.upcycle import upcycle_bam, upcycle_btx, upcycle_nexus

__all__ = [
    "add_expert",
    "domain_embedding",
    "fit_encoder",
    "load_encoder",
    "remove_expert",
    "upcycle_bam",
    "upcycle_btx",
    "upcycle_nexus",
]

_HOME = {
    "add_expert": "extend",
    "domain_embedding": "domains",
    "fit_encoder": "domains",
    "load_encoder": "domains",
    "remove_expert": "extend",
    "upcycle_bam": "upcycle",
    "upcycle_btx": "upcycle",
    "upcycle_nexus": "upcycle",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"koine.combine.{_HOME[name]}"), name)
    raise AttributeError(f"module 'koine.combine' has no attribute '{name}'")
