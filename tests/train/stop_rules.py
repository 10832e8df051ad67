"""Stop rules for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koine.train import arguments_identity


@dataclass(frozen=True)
class StopAfter:
    """Stop after a number of evaluations."""

    count: int

    def __call__(self, evaluations: Sequence[Mapping[str, float]], /) -> str | None:
        if len(evaluations) < self.count:
            return None
        return f"{self.count} evaluations were made, the last with figure {evaluations[-1]['figure']}"

    def identity(self) -> dict[str, Any]:
        return arguments_identity(self)


@dataclass(frozen=True)
class KeepSecond(StopAfter):
    """Stop after a number of evaluations, and keep the second as the best."""

    def best(self, evaluations: Sequence[Mapping[str, float]], /) -> int:
        return min(len(evaluations), 2) - 1
