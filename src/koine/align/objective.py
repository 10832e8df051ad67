"""The objective of preference training: a loss over groups, and the figures that show what it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from koine.align.log_probabilities import LogProbabilities, completion_log_probabilities
from koine.align.loss_spec import LossSpec
from koine.align.losses import kto_reference_point
from koine.align.reference import Reference, ReferenceLogProbabilities
from koine.data.groups import GroupBatch
from koine.errors import UserError
from koine.model.moe.losses import AllReduce


@dataclass(frozen=True)
class PreferenceObjective:
    """A preference loss as an objective of `koine.train.train`; its units are groups.

    Metrics are means over groups, see `koine.align.loss_spec.group_metrics`. Router losses of a mixture of
    experts are left out.

    temperature: that the completions were sampled with; all log-probabilities are of this distribution.
    reference_point: KTO's z0 of a step, which `of_step` sets.
    """

    loss: LossSpec
    reference: Reference | None = None
    temperature: float = 1.0
    reference_point: Tensor | None = field(default=None, compare=False)

    def __call__(self, model: Any, batch: GroupBatch, /) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over the groups of `batch`, and the sums of its metrics."""
        policy = completion_log_probabilities(model, batch, temperature=self.temperature)
        reference = None if self.reference is None else self.reference.of(batch).to(policy.sums.dtype)
        behaviour = None if batch.behaviour is None else batch.behaviour.to(policy.sums.dtype)
        losses_g, metrics = self.loss(
            policy,
            reference,
            batch.groups,
            # On-policy the ratio is 1: what engine and trainer round differently is no change of the policy.
            behaviour=None if batch.on_policy else behaviour,
            reference_point=self.reference_point,
        )
        if behaviour is not None:
            metrics |= _drawn_metrics(policy, behaviour, batch)
        if self.reference_point is not None:
            metrics["reference_point"] = self.reference_point.expand(len(batch.groups))
        sums = {name: float(values_g.sum()) for name, values_g in metrics.items()}
        return losses_g.sum(), {"units": float(len(batch.groups)), **sums}

    def of_step(self, model: Any, batches: Iterable[GroupBatch], ranks: AllReduce, /) -> PreferenceObjective:
        """Return the objective of a step with KTO's reference point; itself where the loss needs none.

        The point is of the whole step, over micro batches and ranks: a forward pass of every prompt with the
        completion of another record, without gradients.
        """
        if not self.loss.needs_reference_point:
            return self
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            if not isinstance(self.reference, ReferenceLogProbabilities) or batch.mismatched is None:
                raise ValueError("the reference point needs a reference and labelled groups")
            exchanged = batch.mismatched().to(batch.tokens.device)
            with torch.no_grad():
                policy = completion_log_probabilities(model, exchanged).sums
            ratios = policy - self.reference.of_mismatched(exchanged).to(policy.dtype)
            total = total.to(ratios.device) + torch.stack(
                (ratios.sum().double(), ratios.new_tensor(len(ratios)).double())
            )
        log_ratio, count = ranks.sum(total)
        return replace(
            self, reference_point=kto_reference_point(log_ratio / count, torch.zeros_like(log_ratio))
        )

    def identity(self) -> dict[str, Any]:
        """Return the loss with all parameters, and the key of the reference's log-probabilities."""
        return {
            "loss": self.loss.identity(),
            "reference": None if self.reference is None else self.reference.key,
            "temperature": self.temperature,
        }


def _drawn_metrics(policy: LogProbabilities, behaviour: Tensor, batch: GroupBatch) -> dict[str, Tensor]:
    """Return of drawn completions, `[G]` each, without gradient.

    `moved`: mean |log-ratio| of the policy to the one that drew them, nats a completion. `completion_tokens`:
    their mean length. `failed`: completions without a score.
    """
    counts = torch.bincount(batch.group_of, minlength=len(batch.groups)).to(behaviour.dtype)
    moved = (policy.sums.detach() - behaviour).abs()
    means = {
        name: torch.zeros_like(counts).index_add_(0, batch.group_of, values) / counts
        for name, values in (("moved", moved), ("completion_tokens", policy.lengths))
    }
    failed = torch.tensor(
        [one.failed for one in batch.groups], dtype=behaviour.dtype, device=behaviour.device
    )
    return {**means, "failed": failed}


def preference_objective(
    loss: LossSpec | str, reference: Reference | None = None, *, temperature: float = 1.0
) -> PreferenceObjective:
    """Return the objective of a loss, such as `dpo:beta=0.1+nll:weight=0.2`.

    A reference that the loss does not need only adds figures. Raises `UserError` for an unknown loss, and for
    one that needs a reference where there is none; `ValueError` for a reference of another temperature.
    """
    spec = LossSpec.parse(loss) if isinstance(loss, str) else loss
    if spec.needs_reference and reference is None:
        raise UserError(
            f"the loss {spec} needs a reference", hint="give --reference start or --reference MODEL"
        )
    if reference is not None and reference.temperature != temperature:
        raise ValueError(
            f"the reference has a temperature of {reference.temperature}, the policy {temperature}"
        )
    return PreferenceObjective(spec, reference, temperature)
