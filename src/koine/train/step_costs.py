"""What a step of each shape asks of a rank: its rows, how many of them at once, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from koine.errors import UserError
from koine.model.language_model import LanguageModel
from koine.train.determinism import measured_ceiling, training_flops
from koine.train.distributed import Ranks
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture, Shape


class Work(NamedTuple):
    """A step's share on one rank."""

    rows: int
    micro: int
    """Rows computed at once."""
    flops: float | None
    """Operations a token; `None` for an architecture that is not ours."""
    ceiling: float | None
    """Operations a second of a matmul of this size; `None` likewise."""


def work_of_each_shape(
    model: LanguageModel, settings: TrainSettings, mixture: Mixture, ranks: Ranks, dtype: torch.dtype
) -> dict[Shape, Work]:
    """The share of every shape that a step of the mixture has. Raises `UserError` where a batch cannot be split over the ranks."""
    found = {}
    for shape in mixture.shapes():
        rows = shape.batch_size // ranks.world_size
        if rows * ranks.world_size != shape.batch_size:
            raise UserError(
                f"a batch of {shape.batch_size} sequences cannot be split over {ranks.world_size} processes",
                hint="choose a batch size that is a multiple of their number",
            )
        micro = settings.rows_at_once(rows, shape.sequence_length, mixture.sequence_length)
        found[shape] = Work(
            rows,
            micro,
            training_flops(model, shape.sequence_length),
            measured_ceiling(model, micro * shape.sequence_length, dtype, ranks.device),
        )
    return found
