"""The objective of reward models: which of two completions is the better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koine.align.reward_losses import bradley_terry
from koine.align.reward_scores import completion_scores
from koine.data.groups import GroupBatch
from koine.errors import UserError
from koine.fields import check_number
from koine.train.fingerprint import arguments_identity


@dataclass(frozen=True)
class BradleyTerry:
    """Bradley-Terry loss on pairs (`koine.align.reward_losses.bradley_terry`); its units are pairs.

    margins: whether the records' margins are part of the loss.
    centring: weight of the term that keeps the scores of a pair around 0.

    Metrics are means over pairs: `accuracy`, the probability of the label that the scores agree with (0.5 for a
    tie), `score_difference`, first less second, and `score`, of both.
    """

    margins: bool = True
    centring: float = 0.0

    def __post_init__(self) -> None:
        check_number("centring", self.centring, low=0)

    def __call__(self, model: Any, batch: GroupBatch, /) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over the pairs of `batch`, and the sums of its metrics."""
        for group in batch.groups:
            if group.kind != "preferences":
                raise UserError(
                    f"a reward model learns from pairs, and these are {group.kind} completions",
                    hint="tokenize with --kind preferences",
                )
        scores = completion_scores(model, batch)
        # A revised pair (SRPO) has two more after each answer: the reward model learns from the first two.
        of_group = torch.bincount(batch.group_of, minlength=len(batch.groups))
        first = of_group.cumsum(0) - of_group
        rewards_g2 = torch.stack([scores[first], scores[first + 1]], dim=1)
        probability_g = rewards_g2.new_tensor([group.probability for group in batch.groups])
        margin_g = rewards_g2.new_tensor([group.margin for group in batch.groups])
        losses_g = bradley_terry(
            rewards_g2, probability_g, margin_g if self.margins else None, centring=self.centring
        )
        values_g2 = rewards_g2.detach()
        difference_g = values_g2[:, 0] - values_g2[:, 1]
        right_g = (1 + difference_g.sign() * (2 * probability_g - 1)) / 2
        return losses_g.sum(), {
            "units": float(len(batch.groups)),
            "accuracy": float(right_g.sum()),
            "score_difference": float(difference_g.sum()),
            "score": float(values_g2.mean(dim=1).sum()),
        }

    def identity(self) -> dict[str, Any]:
        """Return the arguments."""
        return arguments_identity(self)
