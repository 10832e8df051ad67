"""Preference losses: pure functions of the log-probabilities of pairs of completions.

Shapes: `[G, 2]` for the two completions of G groups. Completion 0 is the chosen one, y_w. Completion 1 is the
rejected one, y_l. A log-probability is the SUM over the completion's tokens, `log pi(y|x)`. Arguments that end
in `_means` are divided by the number of tokens. `D = log[pi(y_w)/pi_ref(y_w)] - log[pi(y_l)/pi_ref(y_l)]`.

Every function returns the loss of each group, `[G]`, in the dtype of `policy`. Its mean over groups is what
training minimises. The reference carries no gradient.

`probability` `[G]` is the probability that completion 0 is better. None means 1, and 0.5 is a tie. Every loss
here is then the expected loss over the label: `p * loss(y_w, y_l) + (1 - p) * loss(y_l, y_w)`. No loss here
reads the margin of a pair. `koine.align.reward_losses.bradley_terry` does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_ratio_difference(policy: Tensor, reference: Tensor) -> Tensor:
    """Return `D`, the difference of the log-ratios of the two completions, `[G]`."""
    ratios = policy - reference
    return ratios[:, 0] - ratios[:, 1]


def over_labels(loss: Tensor, swapped: Tensor, probability: Tensor | None) -> Tensor:
    """Return the expected loss over the label: `p * loss + (1 - p) * swapped`, all `[G]`.

    Args:
        loss: the loss where completion 0 is the better one.
        swapped: the loss where completion 1 is.
        probability: of the first case; None: 1.
    """
    if probability is None:
        return loss
    p = probability.to(loss.dtype)
    return p * loss + (1 - p) * swapped


def dpo(
    policy: Tensor,
    reference: Tensor,
    probability: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return DPO's loss, `-log sigmoid(beta * D)`.

    Label smoothing adds a share of the loss for the other label: `(1 - e) * loss(D) + e * loss(-D)`.
    Source: arXiv 2305.18290. TRL calls it `sigmoid`.
    """
    logits = beta * log_ratio_difference(policy, reference)
    loss, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    smoothed = (1 - label_smoothing) * loss + label_smoothing * swapped
    return over_labels(smoothed, (1 - label_smoothing) * swapped + label_smoothing * loss, probability)


def robust(
    policy: Tensor,
    reference: Tensor,
    probability: Tensor | None = None,
    *,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """Return robust DPO's loss, `[(1 - e) * dpo(D) - e * dpo(-D)] / (1 - 2e)`.

    It is DPO's loss without bias where a share e < 0.5 of the labels is wrong. It can be negative.
    Source: arXiv 2403.00409. TRL calls it `robust`.
    """
    logits = beta * log_ratio_difference(policy, reference)
    loss, swapped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    clean, noise = (
        (1 - label_smoothing) / (1 - 2 * label_smoothing),
        label_smoothing / (1 - 2 * label_smoothing),
    )
    return over_labels(clean * loss - noise * swapped, clean * swapped - noise * loss, probability)


def ipo(policy: Tensor, reference: Tensor, probability: Tensor | None = None, *, tau: float) -> Tensor:
    """Return IPO's loss on sums, `(tau * D - 1/2)^2`.

    With a probability its minimum is at `tau * D = p - 1/2`. Source: arXiv 2310.12036, scaled by tau^2 as in
    arXiv 2410.11677. TRL's `ipo` is `ipo_mean`.
    """
    scaled = tau * log_ratio_difference(policy, reference)
    return over_labels((scaled - 0.5).square(), (scaled + 0.5).square(), probability)


def ipo_mean(
    policy_means: Tensor, reference_means: Tensor, probability: Tensor | None = None, *, beta: float
) -> Tensor:
    """Return TRL's `ipo`, `(D - 1/(2 beta))^2` with log-probabilities per token."""
    difference = log_ratio_difference(policy_means, reference_means)
    target = 1 / (2 * beta)
    return over_labels((difference - target).square(), (difference + target).square(), probability)


def hinge(policy: Tensor, reference: Tensor, probability: Tensor | None = None, *, beta: float) -> Tensor:
    """Return TRL's `hinge`, `max(0, 1 - beta * D)`. The Hinge of arXiv 2410.11677 is `slic`."""
    scaled = beta * log_ratio_difference(policy, reference)
    return over_labels(torch.relu(1 - scaled), torch.relu(1 + scaled), probability)


def slic(
    policy_means: Tensor,
    reference_means: Tensor | None,
    probability: Tensor | None = None,
    *,
    alpha: float,
    gamma: float = 1.0,
) -> Tensor:
    """Return SLiC-HF's loss as arXiv 2410.11677 trains it (Hinge), on log-probabilities per token.

    `max(0, gamma - m(y_w) + m(y_l)) + alpha * log(1 + exp(1 - m(y_w) + m_ref(y_w)))` with `m` the mean
    log-probability. The first term has no reference. The second keeps y_w above the reference.

    Args:
        policy_means: `[G, 2]`.
        reference_means: `[G, 2]`; not read where alpha is 0.
        probability: `[G]`.
        alpha: weight of the second term.
        gamma: margin of the first term, in nats per token.
    """
    difference = policy_means[:, 0] - policy_means[:, 1]
    loss, swapped = torch.relu(gamma - difference), torch.relu(gamma + difference)
    if alpha:
        if reference_means is None:
            raise ValueError("slic needs a reference unless alpha is 0")
        regularisers = alpha * F.softplus(1 - (policy_means - reference_means))
        loss, swapped = loss + regularisers[:, 0], swapped + regularisers[:, 1]
    return over_labels(loss, swapped, probability)


def simpo(policy_means: Tensor, probability: Tensor | None = None, *, beta: float, gamma: float) -> Tensor:
    """Return SimPO's loss, `-log sigmoid(beta * (m(y_w) - m(y_l)) - gamma)` on means; no reference.

    Source: arXiv 2405.14734. TRL: `CPOTrainer` with `loss_type="simpo"` and `cpo_alpha=0`.
    """
    scaled = beta * (policy_means[:, 0] - policy_means[:, 1])
    return over_labels(-F.logsigmoid(scaled - gamma), -F.logsigmoid(-scaled - gamma), probability)


def nll(policy: Tensor, probability: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of the better completion, `-log pi(y_w)`.

    Sums in give the regulariser of arXiv 2410.11677. Means in give `nll-mean`, TRL's `sft`: TRL divides by the
    tokens of its whole batch, so both agree where the batch is one pair.
    """
    return over_labels(-policy[:, 0], -policy[:, 1], probability)


def kto(
    policy: Tensor,
    reference: Tensor,
    labels: Tensor,
    reference_point: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Return KTO's loss, the mean over the k completions of each group, `[G]`.

    `w_D * (1 - sigmoid(beta * (r - z0)))` for a desirable completion, `w_U * (1 - sigmoid(beta * (z0 - r)))` for
    another, with `r = log[pi(y)/pi_ref(y)]`. Source: arXiv 2402.01306. TRL: `KTOTrainer`.

    Args:
        policy: `[G, k]` sums; any k.
        reference: `[G, k]` sums.
        labels: `[G, k]` bool; True: desirable.
        reference_point: z0, from `kto_reference_point` over the whole step. It carries no gradient.
        beta: strength.
        desirable_weight: w_D.
        undesirable_weight: w_U.
    """
    above = policy - reference - reference_point
    desirable = desirable_weight * torch.sigmoid(-beta * above)
    undesirable = undesirable_weight * torch.sigmoid(beta * above)
    return torch.where(labels, desirable, undesirable).mean(dim=1)


def kto_reference_point(policy: Tensor, reference: Tensor) -> Tensor:
    """Return KTO's z0, `max(0, mean log-ratio)`, a scalar without gradient.

    Args:
        policy: sums of all completions of the step, over micro-batches and ranks; any shape. KTO takes each
            completion after the prompt of another record.
        reference: of the same completions.
    """
    return (policy - reference).detach().mean().clamp(min=0)
