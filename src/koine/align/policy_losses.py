"""Losses of scored completions: k > 1 completions of each prompt, and a score of each.

Shapes: `[G, k]` for k completions of G prompts. Log-probabilities are SUMS over a completion's tokens. Every
function returns the loss of each group, `[G]`, in the dtype of `policy`. Scores need no common scale between
groups: adding a constant to the scores of a group changes no loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Return `R_i - mean of the other completions' R`, `[G, k]`, which is `k/(k-1) * (R_i - mean)`."""
    k = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * (k / (k - 1))


def copg(policy: Tensor, reference: Tensor, scores: Tensor, *, beta: float) -> Tensor:
    """Return the contrastive policy gradient loss, `1/(k-1) * sum_{i>j} (R_b(y_i) - R_b(y_j))^2`.

    `R_b(y) = R(y) - beta * log[pi(y)/pi_ref(y)]`. Completions may come from any policy. Where pi = pi_ref, the
    gradient with respect to `log pi(y_i)` is `-2 beta * (R_i - mean of the others)`.
    Source: arXiv 2406.19185; arXiv 2504.00698 (Command A).

    Args:
        policy: `[G, k]` with k > 1.
        reference: `[G, k]`.
        scores: `[G, k]`, R.
        beta: strength of the KL regularisation.
    """
    regularised = scores.to(policy.dtype) - beta * (policy - reference)
    # sum_{i>j} (a_i - a_j)^2 = k * sum_i (a_i - mean)^2, without a table of pairs.
    k = policy.shape[1]
    return (regularised - regularised.mean(dim=1, keepdim=True)).square().sum(dim=1) * (k / (k - 1))


def rloo(
    policy: Tensor,
    reference: Tensor | None,
    scores: Tensor,
    behaviour: Tensor | None = None,
    *,
    beta: float,
    clip: float = 0.2,
) -> Tensor:
    """Return a surrogate whose gradient is REINFORCE with a leave-one-out baseline, mean over the k completions.

    `-min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A)` with `ratio = pi(y)/behaviour(y)` and
    `A_i = R_i - beta * log[behaviour(y_i)/pi_ref(y_i)] - mean of the others`. The advantage carries no gradient.
    On-policy the ratio is 1: the gradient is `-A_i/k` for `log pi(y_i)`, and the value is 0.
    Source: arXiv 2402.14740. TRL: `RLOOTrainer`.

    Args:
        policy: `[G, k]` with k > 1.
        reference: `[G, k]`; not read where beta is 0.
        scores: `[G, k]`, R.
        behaviour: `[G, k]`, of the policy that drew the completions; None: `policy` itself.
        beta: weight of the KL penalty.
        clip: largest change of the ratio that is rewarded.
    """
    drawn = policy.detach() if behaviour is None else behaviour
    rewards = scores.to(policy.dtype)
    if beta:
        if reference is None:
            raise ValueError("rloo needs a reference unless beta is 0")
        rewards = rewards - beta * (drawn - reference)
    advantages = leave_one_out_advantages(rewards).detach()
    ratio = torch.exp(policy - drawn)
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean(dim=1)
