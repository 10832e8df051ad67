"""Every hyperparameter of the loop, declared once: its type, its default, its bounds and its help text."""

# ruff: noqa: RUF009  (`setting` makes a dataclass field)
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from koine.fields import MAX_INTEGER, check_boolean, check_choice, check_integer, check_number, check_text
from koine.hardware import chosen_dtype

Schedule = Literal["cosine", "constant", "linear", "wsd"]
DType = Literal["auto", "float32", "bfloat16"]
Compile = Literal["auto", "on", "off"]

# What a field changes: the result itself, only its rounding, or nothing of it.
RESULT, ROUNDING, NOTHING = "result", "rounding", "nothing"


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    changes: str = RESULT,
) -> Any:
    """A dataclass field with its help text, its bounds (`low`, `high` inclusive, `above` exclusive) and what it changes."""
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "above": above, "changes": changes}
    )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train; what on is said by the mixture. Raises `UserError` where a value is out of its bounds."""

    learning_rate: float = setting(1e-3, "Peak learning rate of AdamW.", above=0, high=1e3)
    schedule: Schedule = setting(
        "cosine", "Course of the learning rate, restarting with each phase; wsd: warm-up, stable, decay."
    )
    warmup_steps: int = setting(0, "Steps of linear warm-up at the start of each phase.", low=0)
    decay_share: float = setting(0.2, "Share of a phase in which wsd decays, at its end.", low=0, high=1)
    min_lr_ratio: float = setting(
        0.1, "Where the schedule ends, as a share of the learning rate.", low=0, high=1
    )
    weight_decay: float = setting(
        0.1, "Weight decay; of matrices only, never of norms, gains or biases.", low=0, high=1e3
    )
    beta1: float = setting(0.9, "AdamW's decay of the mean gradient.", low=0, high=0.99999)
    beta2: float = setting(0.95, "AdamW's decay of the mean squared gradient.", low=0, high=0.999999)
    epsilon: float = setting(1e-8, "AdamW's epsilon.", low=1e-30, high=1)
    clip_norm: float = setting(1.0, "Largest norm of the gradient; 0: no clipping.", low=0)
    dtype: DType = setting(
        "auto",
        "Precision of the computation (auto: the one in which this machine is faster); weights and optimiser stay in float32 either way.",
    )
    seed: int = setting(
        0, "Seed of the random state (a model's first weights are drawn from it).", low=0, high=2**63 - 1
    )
    spike_deviations: float = setting(
        10.0,
        "Stop where the loss is this many robust deviations above its recent median, and spike_rise above it; 0: never.",
        low=0,
    )
    spike_rise: float = setting(1.0, "Smallest rise, in nats a unit, that counts as a spike.", low=0)
    spike_window: int = setting(64, "How many recent losses the median is taken over.", low=8, high=100_000)
    micro_batch_size: int = setting(
        0,
        "Sequences computed at once on each rank (of long ones, as many as have no more tokens); 0: all of the rank's share.",
        low=0,
        changes=ROUNDING,
    )
    compile: Compile = setting(
        "auto",
        "torch.compile on each block; auto: where it was measured to pay, which is nowhere so far.",
        changes=ROUNDING,
    )
    gradient_checkpointing: bool = setting(
        False,
        "Recompute each block in the backward pass in place of keeping its activations.",
        changes=ROUNDING,
    )
    threads: int = setting(
        0,
        "CPU threads; 0: torch's choice. Bit-identical repetition needs the same number.",
        low=0,
        high=4096,
        changes=ROUNDING,
    )
    checkpoint_every: int = setting(100, "Steps between checkpoints.", low=1, changes=NOTHING)
    keep_last: int = setting(2, "How many of the latest checkpoints stay.", low=1, changes=NOTHING)
    evaluate_every: int = setting(
        0, "Steps between evaluations, and one at the end; 0: none.", low=0, changes=NOTHING
    )
    best_metric: str = setting(
        "",
        "Evaluation metric whose lowest value marks the best checkpoint; empty: the first one.",
        changes=NOTHING,
    )

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, value, expected = field.name, getattr(self, field.name), types[field.name]
            low, high, above = (field.metadata[bound] for bound in ("low", "high", "above"))
            if get_args(expected):
                check_choice(name, value, get_args(expected))
            elif expected is int:
                check_integer(name, value, low=low, high=MAX_INTEGER if high is None else high)
            elif expected is float:
                object.__setattr__(self, name, check_number(name, value, low=low, high=high, above=above))
            elif expected is bool:
                check_boolean(name, value)
            else:
                check_text(name, value)
        object.__setattr__(self, "dtype", chosen_dtype(self.dtype))

    def rows_at_once(self, rows: int, sequence_length: int, base_length: int) -> int:
        """How many of `rows` are computed at once: no more tokens than `micro_batch_size` rows of `base_length`, at least one row."""
        if not self.micro_batch_size:
            return rows
        return max(1, min(rows, self.micro_batch_size * base_length // sequence_length))

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return dataclasses.asdict(self)

    def that_change(self, what: str) -> dict[str, Any]:
        """The fields that change `what` (`RESULT`, `ROUNDING` or `NOTHING`)."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.metadata["changes"] == what
        }
