"""Batches: the tensors of one training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from koine.data.mixture import Mixture

NO_TARGET = -100
"""Marks a position without a target (torch's cross-entropy ignores this value)."""


class Span(NamedTuple):
    """A slice of one document inside a row."""

    source: str
    language: str
    domain: str
    record_id: str
    shard: int
    document: int
    """Number of the document inside its shard."""
    start: int
    end: int
    """Tokens `[start, end)` of the document."""
    column: int
    """Column of the row where the slice begins."""


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents.

    Attributes:
        tokens: `[batch, time]` int64 ids.
        targets: `[batch, time]` int64, the next token of the same document; -100 where there is none, on
            padding, and on the prompt tokens of chats.
        document_ids: `[batch, time]` int32, counting up inside a row, -1 for padding; `None` if attention may
            cross documents.
    """

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor | None
    _spans: Callable[[], list[list[Span]]]

    @property
    def documents(self) -> list[list[Span]]:
        """The slices of documents in each row, looked up on demand."""
        return self._spans()

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        ids = self.document_ids
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            document_ids=None if ids is None else ids.to(device),
        )


class StepBatches(Protocol):
    """The batches of a training, by step: `DataOrder`, `PreferenceOrder`, or an order of your own.

    It may also have `holds_groups`, `sources`, `cut_text`, `drawn()` and `record()`, as those two have.
    """

    @property
    def mixture(self) -> Mixture:
        """Number of steps and shape of their batches."""
        ...

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> Any:
        """Return what the objective gets: the rows of `rank` at `step`, or a slice of them."""
        ...
