"""A data order over random tokens, and an objective that calls a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from koine.data.mixture import Shape, StepPosition
from koine.files import write_atomically


class FakeSpan(NamedTuple):
    source: str
    language: str
    domain: str
    record_id: str
    start: int
    end: int


class FakeSource(NamedTuple):
    name: str
    path: Path


class FakePhase(NamedTuple):
    name: str
    steps: int
    sources: tuple[FakeSource, ...]

    @property
    def all_sources(self) -> tuple[FakeSource, ...]:
        return self.sources


@dataclass(frozen=True)
class FakeMixture:
    phases: tuple[FakePhase, ...]
    sequence_length: int = 16
    batch_size: int = 4
    seed: int = 0
    packing: str = "concat"
    cross_document_attention: bool = True

    def position(self, step: int) -> StepPosition:
        index = 0
        while step >= self.phases[index].steps:
            step -= self.phases[index].steps
            index += 1
        return StepPosition(index, step, False, step)

    def shape(self, step: int) -> Shape:
        return Shape(self.sequence_length, self.batch_size)

    def shapes(self) -> dict[Shape, int]:
        return {self.shape(0): sum(phase.steps for phase in self.phases)}

    def to_json(self) -> dict[str, Any]:
        return {
            "phases": [[phase.name, phase.steps] for phase in self.phases],
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


@dataclass
class FakeBatch:
    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None
    documents: list[list[FakeSpan]] = field(default_factory=list)

    def to(self, device: torch.device) -> FakeBatch:
        return self


@dataclass
class FakeOrder:
    """Batches drawn from (seed, step) alone; every third row has prompt tokens without loss."""

    mixture: FakeMixture
    vocab_size: int = 64

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> FakeBatch:
        mixture = self.mixture
        generator = torch.Generator().manual_seed(mixture.seed * 100_003 + step)
        shape = (mixture.batch_size, mixture.sequence_length + 1)
        # Skewed, so that there is something to learn.
        ids = (torch.rand(shape, generator=generator) ** 3 * self.vocab_size).long()
        targets = ids[:, 1:].clone()
        targets[::3, : mixture.sequence_length // 2] = -100
        per_rank = mixture.batch_size // world_size
        rows = range(rank * per_rank, (rank + 1) * per_rank)[micro_batch or slice(None)]
        keep = list(rows)
        return FakeBatch(
            ids[keep, :-1],
            targets[keep],
            None,
            [[FakeSpan("s", "de", "web", f"doc-{step}-{row}", 0, mixture.sequence_length)] for row in keep],
        )


def fake_order(folder: Path, *, steps: tuple[int, ...] = (12,), **sizes: int) -> FakeOrder:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "manifest.json").exists():
        # Whole at once: another process may be reading it.
        write_atomically(folder / "manifest.json", "{}")
    source = FakeSource("s", folder)
    phases = tuple(FakePhase(f"phase-{index}", count, (source,)) for index, count in enumerate(steps))
    return FakeOrder(FakeMixture(phases, **sizes))


@dataclass(frozen=True)
class FunctionObjective:
    """An objective that calls a function of a test."""

    function: Callable[[nn.Module, Any], tuple[Tensor, dict[str, float]]] = field(compare=False)

    def __call__(self, model: nn.Module, batch: Any, /) -> tuple[Tensor, dict[str, float]]:
        return self.function(model, batch)

    def identity(self) -> dict[str, Any]:
        return {}
