"""Add training steps that share batch, precision and seed to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koine.data.mixture import Packing
from koine.plan import Artifact, Plan
from koine.steps.text_mixture import LongText, TextMixture, TextSource
from koine.steps.training import train_model, training_settings
from koine.train.settings import OptimiserName, TrainSettings


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Adds `train_model` steps with one batch shape, precision, seed and optimiser to a plan.

    sequence_length: tokens of a row. batch_size: rows of a step. micro_batch_size: rows computed at once.
    """

    plan: Plan
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    dtype: str
    seed: int
    optimiser: OptimiserName = "adamw"

    def mixture(self, sources: Sequence[TextSource], steps: int, **fields: Any) -> TextMixture:
        """Return a mixture with this batch shape; fields: further fields of `TextMixture`."""
        shared = {
            "sequence_length": self.sequence_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }
        return TextMixture(sources=tuple(sources), steps=steps, **{**shared, **fields})

    def settings(self, steps: int, learning_rate: float, **fields: Any) -> TrainSettings:
        """Return settings with this precision and seed; fields: further fields of `TrainSettings`."""
        shared = {
            "micro_batch_size": self.micro_batch_size,
            "dtype": self.dtype,
            "seed": self.seed,
            "optimiser": self.optimiser,
        }
        return training_settings(steps=steps, learning_rate=learning_rate, **{**shared, **fields})

    def train(
        self,
        name: str,
        model: Artifact | None,
        tokens: Artifact | Mapping[str, Artifact],
        sources: Sequence[TextSource],
        *,
        steps: int,
        learning_rate: float,
        packing: Packing = "concat",
        long: LongText | None = None,
        settings: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> Artifact:
        """Add a training step to the plan and return the trained model.

        Args:
            name: name of the artifact.
            model: the model to train further; None: a new one of `config`.
            tokens: tokens of all sources, or of each source by its name.
            sources: the mixture's sources.
            steps: training steps.
            learning_rate: peak learning rate.
            packing: how documents fill rows (`koine.data.Mixture`).
            long: batches of long rows.
            settings: further fields of `TrainSettings`.
            more: further inputs and parameters of `train_model`.
        """
        fields = settings or {}
        seed = fields.get("seed", self.seed)
        mixture = self.mixture(sources, steps, packing=packing, long=long, seed=seed)
        return self.plan.step(
            train_model,
            name=name,
            model=model,
            tokens={
                source.name: tokens if isinstance(tokens, Artifact) else tokens[source.name]
                for source in mixture.all_sources
            },
            mixture=mixture,
            settings=self.settings(steps, learning_rate, **fields),
            **more,
        )
