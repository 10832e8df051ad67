"""SRPO: one network answers a prompt, and improves an answer that it is shown (arXiv 2406.01660).

The six completions of a group, in this order:

| index | context | completion |
|---|---|---|
| 0, 1 | the prompt | y_w, y_l |
| 2, 3 | the prompt, y_w, the revision prompt | y_w, y_l |
| 4, 5 | the prompt, y_l, the revision prompt | y_w, y_l |
"""

from __future__ import annotations

from torch import Tensor

COMPLETIONS = 6
"""Completions of a group."""


def srpo_residuals(
    policy: Tensor, reference: Tensor, probability: Tensor | None = None, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how far two identities of SRPO's optimum are from holding; all are 0 there.

    With `r(y1, y2)` the log-ratio of y2 as a revision of y1, and `P` the probability that y2 is better than y1:

    - (I) `P - 1/2 = beta * [r(y1, y2) - r(y1, y1)]`;
    - (II) `P - 1/2 = beta/2 * [r(y1, y2) - r(y2, y1) + log-ratio(y2) - log-ratio(y1)]`.

    Args:
        policy: `[G, 6]` sums.
        reference: `[G, 6]` sums.
        probability: `[G]`, that y_w is better; None: 1.
        beta: strength of the KL regularisation.

    Returns:
        The residuals, each `[G]`: of (I) with (y1, y2) = (y_l, y_w), of (I) with (y_w, y_l), of (II). The
        other direction of (II) only has the other sign.
    """
    answer_w, answer_l, w_to_w, w_to_l, l_to_w, l_to_l = (policy - reference).unbind(dim=1)
    target = 0.5 if probability is None else probability.to(policy.dtype) - 0.5
    improves = target - beta * (l_to_w - l_to_l)
    worsens = -target - beta * (w_to_l - w_to_w)
    agrees = target - 0.5 * beta * (l_to_w - w_to_l + answer_w - answer_l)
    return improves, worsens, agrees


def srpo(
    policy: Tensor, reference: Tensor, probability: Tensor | None = None, *, alpha: float, beta: float
) -> Tensor:
    """Return SRPO's loss, `(1 - alpha) * (II)^2 + alpha * (I)^2`, each the mean of both directions, `[G]`.

    Args:
        policy: `[G, 6]` sums, in the order of this module.
        reference: `[G, 6]` sums.
        probability: `[G]`, that y_w is better; None: 1. It is the `P` of the identities, so that a tie asks
            for no preference.
        alpha: share of (I), which trains the revisions only.
        beta: strength of the KL regularisation.
    """
    improves, worsens, agrees = srpo_residuals(policy, reference, probability, beta=beta)
    revision = 0.5 * (improves.square() + worsens.square())
    return (1 - alpha) * agrees.square() + alpha * revision
