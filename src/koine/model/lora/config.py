"""The settings of a LoRA adapter, declared once: type, default, bounds and help text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from koine.errors import UserError
from koine.fields import check_dataclass, checked_field

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer but the head."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter; it adds to each target `scale * B A x`, with A `[rank, in]` and B `[out, rank]`.

    Raises `UserError` for a value that is out of its bounds.
    """

    rank: int = checked_field(
        0,
        "Train a LoRA adapter of this rank in place of the weights; 0: train the weights.",
        low=0,
        high=65536,
    )
    # Twice the rank is what arXiv 2405.09673 (section 4) found best over many ranks; the scale is then 2, and
    # a learning rate found with one rank serves another.
    alpha: float = checked_field(
        0.0, "LoRA's alpha: B A is multiplied by alpha / rank; 0: twice the rank.", low=0, high=1e6
    )
    dropout: float = checked_field(0.0, "Dropout on the input of a LoRA adapter.", low=0, high=0.99)
    targets: str = checked_field(
        "",
        "Modules that get an adapter, by the ends of their names, with commas between (q_proj,v_proj); empty: "
        "all linear layers but the head.",
    )
    rslora: bool = checked_field(
        False, "Multiply by alpha / sqrt(rank), for large ranks (rsLoRA); --lora-alpha must be given."
    )

    def __post_init__(self) -> None:
        check_dataclass(self)
        if not self.rank:
            default = LoraConfig.__dataclass_fields__
            for name in ("alpha", "dropout", "targets", "rslora"):
                if getattr(self, name) != default[name].default:
                    raise UserError(
                        f"the {name} of a LoRA adapter is given, and no rank",
                        hint="give the rank too (--lora-rank)",
                    )
        elif self.rslora and not self.alpha:
            raise UserError(
                "rsLoRA has no default alpha", hint="give --lora-alpha; the scale is alpha / sqrt(rank)"
            )
        elif not self.alpha:
            object.__setattr__(self, "alpha", 2.0 * self.rank)

    @property
    def scale(self) -> float:
        """Factor on `B A`."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets; empty for all linear layers but the head."""
        names = tuple(name for part in self.targets.split(",") if (name := part.strip()))
        return () if names == (ALL_LINEAR,) else names

    def to_json(self) -> dict[str, Any]:
        """Return what determines the adapter, as JSON values."""
        return {
            "rank": self.rank,
            "alpha": self.alpha,
            "dropout": self.dropout,
            "targets": list(self.target_names),
            "rslora": self.rslora,
        }
