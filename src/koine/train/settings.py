"""Hyperparameters of training, declared once: type, default, bounds and help text."""

# ruff: noqa: RUF009  (`checked_field` makes a dataclass field)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from koine.fields import check_dataclass, checked_field
from koine.hardware import chosen_dtype

OptimiserName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "constant", "linear", "wsd"]
DType = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "on", "off"]

RESULT, ROUNDING, NOTHING = "result", "rounding", "nothing"
"""What a field changes: the result itself, only its rounding, or nothing of it."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of the optimiser, schedule, precision and checkpoints; the mixture holds the data.

    Raises `UserError` for a value that is out of its bounds.
    """

    optimiser: OptimiserName = checked_field(
        "adamw",
        "Optimiser; muon: Muon for the matrices of the blocks, AdamW for the rest, on one process.",
    )
    learning_rate: float = checked_field(1e-3, "Peak learning rate of the optimiser.", above=0, high=1e3)
    schedule: Schedule = checked_field(
        "cosine", "Learning rate schedule, which starts again with each phase; wsd: warm-up, stable, decay."
    )
    warmup_steps: int = checked_field(0, "Steps of linear warm-up at the start of each phase.", low=0)
    decay_share: float = checked_field(
        0.2, "Share of a phase in which wsd decays, at its end.", low=0, high=1
    )
    min_lr_ratio: float = checked_field(
        0.1, "Learning rate at the end of the schedule, as a share of the peak.", low=0, high=1
    )
    weight_decay: float = checked_field(
        0.1, "Weight decay of matrices; norms, gains and biases are never decayed.", low=0, high=1e3
    )
    beta1: float = checked_field(0.9, "AdamW's beta1: decay of the mean gradient.", low=0, high=0.99999)
    beta2: float = checked_field(
        0.95, "AdamW's beta2: decay of the mean squared gradient.", low=0, high=0.999999
    )
    epsilon: float = checked_field(1e-8, "AdamW's epsilon.", low=1e-30, high=1)
    clip_norm: float = checked_field(1.0, "Gradient clipping: largest norm; 0: none.", low=0)
    dtype: DType = checked_field(
        "auto",
        "Precision of the computation; auto: the faster one on this machine. "
        "Master weights and optimiser are float32 always.",
    )
    seed: int = checked_field(0, "Random seed, also of a new model's weights.", low=0, high=2**63 - 1)
    spike_deviations: float = checked_field(
        10.0,
        "Stop at a loss spike: this many robust standard deviations above the recent median, "
        "and spike_rise above it; 0: never.",
        low=0,
    )
    spike_rise: float = checked_field(
        1.0, "Smallest rise above the recent median that counts as a spike, in nats per token.", low=0
    )
    spike_window: int = checked_field(
        64, "Number of recent losses that the median is taken over.", low=8, high=100_000
    )
    micro_batch_size: int = checked_field(
        0,
        "Sequences of a micro-batch on each rank (gradient accumulation); long sequences: as many as have "
        "no more tokens; 0: the whole batch at once.",
        low=0,
        changes=ROUNDING,
    )
    compile: Compile = checked_field(
        "auto",
        "torch.compile of each block; auto: where measured to be faster, which is nowhere so far.",
        changes=ROUNDING,
    )
    gradient_checkpointing: bool = checked_field(
        False,
        "Recompute activations in the backward pass: less memory, more time.",
        changes=ROUNDING,
    )
    threads: int = checked_field(
        0,
        "CPU threads; 0: torch's default. Bit-identical results need the same number.",
        low=0,
        high=4096,
        changes=ROUNDING,
    )
    checkpoint_every: int = checked_field(100, "Steps between checkpoints.", low=1, changes=NOTHING)
    keep_last: int = checked_field(2, "Number of latest checkpoints to keep.", low=1, changes=NOTHING)
    evaluate_every: int = checked_field(
        0, "Steps between evaluations; the last step has one too; 0: none.", low=0, changes=NOTHING
    )
    best_metric: str = checked_field(
        "",
        "Evaluation metric whose lowest value marks the best checkpoint (-NAME: the highest of NAME); "
        "empty: the stop rule's choice, or the first metric.",
        changes=NOTHING,
    )

    def __post_init__(self) -> None:
        check_dataclass(self)
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype))

    def micro_batch_rows(self, rows: int, sequence_length: int, base_length: int) -> int:
        """Return how many of a rank's `rows` are computed at once, at least one.

        They hold no more tokens than `micro_batch_size` rows of `base_length`.
        """
        if not self.micro_batch_size:
            return rows
        return max(1, min(rows, self.micro_batch_size * base_length // sequence_length))

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return dataclasses.asdict(self)

    def fields_that_change(self, what: str) -> dict[str, Any]:
        """Return the fields that change `what` (`RESULT`, `ROUNDING` or `NOTHING`)."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata.get("changes", RESULT) == what
        }
