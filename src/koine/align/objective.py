"""The objective of preference training: a loss over groups, and the figures that show what it does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from koine.align.log_probabilities import completion_log_probabilities
from koine.align.loss_spec import LossSpec
from koine.align.losses import kto_reference_point
from koine.align.reference import ReferenceLogProbabilities
from koine.data.groups import GroupBatch
from koine.errors import UserError
from koine.model.moe.losses import AllReduce


@dataclass(frozen=True)
class PreferenceObjective:
    """A preference loss as an objective of `koine.train.train`; its units are groups.

    Metrics are means over groups, see `koine.align.loss_spec.group_metrics`. Router losses of a mixture of
    experts are left out.

    reference_point: KTO's z0 of a step, which `of_step` sets.
    """

    loss: LossSpec
    reference: ReferenceLogProbabilities | None = None
    reference_point: Tensor | None = field(default=None, compare=False)

    def __call__(self, model: Any, batch: GroupBatch, /) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over the groups of `batch`, and the sums of its metrics."""
        policy = completion_log_probabilities(model, batch)
        reference = None if self.reference is None else self.reference.of(batch).to(policy.sums.dtype)
        losses_g, metrics = self.loss(policy, reference, batch.groups, reference_point=self.reference_point)
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
            if self.reference is None or batch.mismatched is None:
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
        """Return the loss as text and the key of the reference's log-probabilities."""
        return {
            "loss": str(self.loss),
            "reference": None if self.reference is None else self.reference.key,
        }


def preference_objective(
    loss: LossSpec | str, reference: ReferenceLogProbabilities | None = None
) -> PreferenceObjective:
    """Return the objective of a loss, such as `dpo:beta=0.1+nll:weight=0.2`.

    A reference that the loss does not need only adds figures. Raises `UserError` for an unknown loss, and for
    one that needs a reference where there is none.
    """
    spec = LossSpec.parse(loss) if isinstance(loss, str) else loss
    if spec.needs_reference and reference is None:
        raise UserError(
            f"the loss {spec} needs a reference", hint="give --reference start or --reference MODEL"
        )
    return PreferenceObjective(spec, reference)
