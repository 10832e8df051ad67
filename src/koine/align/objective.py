"""The objective of preference training: a loss over groups, and the figures that show what it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from koine.align.log_probabilities import completion_log_probabilities
from koine.align.loss_spec import LossSpec
from koine.align.reference import ReferenceLogProbabilities
from koine.data.groups import GroupBatch
from koine.errors import UserError


@dataclass(frozen=True)
class PreferenceObjective:
    """A preference loss as an objective of `koine.train.train`; its units are groups.

    Metrics are means over groups, see `koine.align.loss_spec.group_metrics`. Router losses of a mixture of
    experts are left out.
    """

    loss: LossSpec
    reference: ReferenceLogProbabilities | None = None

    def __call__(self, model: Any, batch: GroupBatch, /) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over the groups of `batch`, and the sums of its metrics."""
        policy = completion_log_probabilities(model, batch)
        reference = None if self.reference is None else self.reference.of(batch).to(policy.sums.dtype)
        losses_g, metrics = self.loss(policy, reference, batch.groups)
        sums = {name: float(values_g.sum()) for name, values_g in metrics.items()}
        return losses_g.sum(), {"units": float(len(batch.groups)), **sums}

    def identity(self) -> dict[str, Any]:
        """Return the loss with all parameters, and the key of the reference's log-probabilities."""
        return {
            "loss": self.loss.identity(),
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
