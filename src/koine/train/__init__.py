"""Public functions of `koine.train`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from koine.train.estimate import Estimate as Estimate
    from koine.train.estimate import estimate_training as estimate_training
    from koine.train.loop import TrainingStopped as TrainingStopped
    from koine.train.loop import train as train
    from koine.train.loss import chunked_cross_entropy as chunked_cross_entropy
    from koine.train.objectives import Objective as Objective
    from koine.train.objectives import language_modelling as language_modelling
    from koine.train.objectives import supervised_fine_tuning as supervised_fine_tuning
    from koine.train.settings import TrainSettings as TrainSettings

_WHERE = {
    "Estimate": "estimate",
    "Objective": "objectives",
    "TrainSettings": "settings",
    "TrainingStopped": "loop",
    "chunked_cross_entropy": "loss",
    "estimate_training": "estimate",
    "language_modelling": "objectives",
    "supervised_fine_tuning": "objectives",
    "train": "loop",
}
__all__ = [
    "Estimate",
    "Objective",
    "TrainSettings",
    "TrainingStopped",
    "chunked_cross_entropy",
    "estimate_training",
    "language_modelling",
    "supervised_fine_tuning",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"koine.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'koine.train' has no attribute '{name}'")
