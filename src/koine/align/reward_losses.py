"""The loss of a reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    rewards: Tensor,
    probability: Tensor | None = None,
    margin: Tensor | None = None,
    *,
    centring: float = 0.0,
) -> Tensor:
    """Return the Bradley-Terry loss of pairs, `[G]`, in the dtype of `rewards`.

    `-[p * log sigmoid(d - m) + (1 - p) * log sigmoid(m - d)] + centring * (r_0 + r_1)^2` with `d = r_0 - r_1`:
    cross-entropy with soft labels. Without margin and centring its minimum is at `d = log(p / (1 - p))`.
    Source: arXiv 2504.00698 (Command A); margins arXiv 2307.09288; centring arXiv 2312.09244.
    TRL: `RewardTrainer`, which knows no soft labels.

    Args:
        rewards: `[G, 2]`.
        probability: `[G]`, that completion 0 is better; None: 1. A tie is 0.5.
        margin: `[G]`, by how much completion 0's reward is to be the higher one; None: 0.
        centring: weight of the term that keeps the two rewards around 0.
    """
    logits = rewards[:, 0] - rewards[:, 1]
    if margin is not None:
        logits = logits - margin.to(rewards.dtype)
    loss = -F.logsigmoid(logits)
    if probability is not None:
        p = probability.to(rewards.dtype)
        loss = p * loss - (1 - p) * F.logsigmoid(-logits)
    if centring:
        loss = loss + centring * rewards.sum(dim=1).square()
    return loss
