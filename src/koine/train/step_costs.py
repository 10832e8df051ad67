"""Cost of a step of each shape on one rank: rows, rows of a micro-batch, FLOPs and the matmul rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from koine.errors import UserError
from koine.model.config import ModelConfig
from koine.model.counting import training_flops_per_token
from koine.model.language_model import LanguageModel
from koine.train.distributed import Ranks
from koine.train.matmul_rate import measure_matmul_rate
from koine.train.settings import TrainSettings

if TYPE_CHECKING:
    from koine.data.mixture import Mixture, Shape

MAX_MATMUL_TOKENS = 8192  # a larger matmul is no faster


class StepCost(NamedTuple):
    """One rank's share of a step."""

    rows: int
    micro_batch_rows: int
    flops_per_token: float | None
    """None for a model of `transformers`."""
    matmul_rate: float | None
    """FLOP/s of a matmul of a micro-batch's size; None for a model of `transformers`."""

    def micro_batches(self) -> list[slice]:
        """Return the rows of each micro-batch; the last one may have fewer."""
        size = self.micro_batch_rows
        return [slice(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]


def costs_by_shape(
    model: LanguageModel, settings: TrainSettings, mixture: Mixture, ranks: Ranks, dtype: torch.dtype
) -> dict[Shape, StepCost]:
    """Return the cost of each shape that a step of the mixture has.

    Raises `UserError` for a batch size that is no multiple of the number of ranks.
    """
    costs = {}
    for shape in mixture.shapes():
        rows = shape.batch_size // ranks.world_size
        if rows * ranks.world_size != shape.batch_size:
            raise UserError(
                f"a batch of {shape.batch_size} sequences cannot be split over {ranks.world_size} processes",
                hint="choose a batch size that is a multiple of their number",
            )
        micro_batch_rows = settings.micro_batch_rows(rows, shape.sequence_length, mixture.sequence_length)
        tokens = micro_batch_rows * shape.sequence_length
        costs[shape] = StepCost(
            rows,
            micro_batch_rows,
            _flops_per_token(model, shape.sequence_length),
            model_matmul_rate(model, tokens, dtype, ranks.device),
        )
    return costs


def _flops_per_token(model: LanguageModel, sequence_length: int) -> float | None:
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    adapter = getattr(model, "adapter", None)
    trained = 0 if adapter is None else sum(p.numel() for p in model.parameters() if p.requires_grad)
    return training_flops_per_token(config, sequence_length, adapter=trained)


def model_matmul_rate(
    model: LanguageModel, tokens: int, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Return FLOP/s of a matmul with the blocks' input projection; None for a model of `transformers`."""
    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    return measure_matmul_rate(
        min(tokens, MAX_MATMUL_TOKENS),
        config.hidden_size,
        sum(config.projection_sizes),
        dtype,
        str(device),
        torch.get_num_threads(),
    )
