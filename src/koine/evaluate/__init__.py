"""Public functions of `koine.evaluate`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.evaluate.bits import bits_per_byte as bits_per_byte
    from koine.evaluate.intervals import bootstrap_interval as bootstrap_interval
    from koine.evaluate.questions import question_accuracy as question_accuracy
    from koine.evaluate.whole import evaluate_model as evaluate_model

_WHERE = {
    "bits_per_byte": "bits",
    "bootstrap_interval": "intervals",
    "evaluate_model": "whole",
    "question_accuracy": "questions",
}
__all__ = ["bits_per_byte", "bootstrap_interval", "evaluate_model", "question_accuracy"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"koine.evaluate.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'koine.evaluate' has no attribute '{name}'")
