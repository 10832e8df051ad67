"""Add training steps that share batch, precision and seed to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koine.data.mixture import Packing
from koine.model.config import ModelConfig
from koine.plan import Artifact, Plan
from koine.steps.text_mixture import LongText, TextMixture, TextSource
from koine.steps.training import HeldOutProbe, ObjectiveName, train_model, training_settings


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Adds `train_model` steps with one batch shape, precision and seed to a plan.

    sequence_length: tokens of a row. batch_size: rows of a step. micro_batch_size: rows computed at once.
    """

    plan: Plan
    sequence_length: int
    batch_size: int
    micro_batch_size: int
    dtype: str
    seed: int

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
        tokenizer: Artifact | None = None,
        corpus: Artifact | None = None,
        objective: ObjectiveName = "language-modelling",
        config: ModelConfig | None = None,
        probe: HeldOutProbe | None = None,
        context_length: int = 0,
        rope_theta: float = 0.0,
        seed: int | None = None,
        **settings: Any,
    ) -> Artifact:
        """Add a training step to the plan and return the trained model.

        Args:
            name: name of the artifact.
            model: the model to train further; None: a new one of `config`.
            tokens: tokens of all sources, or of each by its name.
            sources: the mixture's sources.
            steps: training steps.
            learning_rate: peak learning rate.
            packing: how documents fill rows (`koine.data.Mixture`).
            long: batches of long rows.
            tokenizer, corpus, objective, config, probe, context_length, rope_theta: see `train_model`.
            seed: random seed; the trainer's own by default.
            settings: further fields of `TrainSettings`.
        """
        seed = self.seed if seed is None else seed
        names = [source.name for source in [*sources, *([long.source] if long else [])]]
        return self.plan.step(
            train_model,
            name=name,
            model=model,
            tokens={one: tokens if isinstance(tokens, Artifact) else tokens[one] for one in names},
            tokenizer=tokenizer,
            corpus=corpus,
            mixture=TextMixture(
                sources=tuple(sources),
                steps=steps,
                sequence_length=self.sequence_length,
                batch_size=self.batch_size,
                seed=seed,
                packing=packing,
                long=long,
            ),
            settings=training_settings(
                steps=steps,
                learning_rate=learning_rate,
                micro_batch_size=self.micro_batch_size,
                dtype=self.dtype,
                seed=seed,
                **settings,
            ),
            objective=objective,
            config=config,
            probe=probe,
            context_length=context_length,
            rope_theta=rope_theta,
        )
