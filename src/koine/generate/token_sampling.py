"""Sample the next token from logits.

Shapes: b batch, v vocabulary (`logits_bv`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate.sampling import Sampling

EXTREME = 1e20
"""Bound of a temperature or penalty. Beyond it, the product with a logit would overflow in float32."""


class NoTokenError(UserError):
    """No token can be sampled from these logits."""

    def __init__(self) -> None:
        super().__init__(
            "no next token can be chosen: the model's scores are NaN or infinite, or no token is allowed",
            hint="use the model in float32, or an earlier checkpoint",
        )


def candidates(logits_bv: Tensor, sampling: Sampling, seen_bv: Tensor | None) -> Tensor:
    """Return the logits after penalty, temperature, top-k, top-p and min-p, in this order.

    Filtered tokens are `-inf`. The order is that of `transformers`. Greedy decoding applies the penalty only.

    Args:
        logits_bv: logits as the model computes them.
        sampling: the settings.
        seen_bv: bool, the tokens in each row's text so far; needed for a repetition penalty only.
    """
    logits_bv = logits_bv.float()
    if sampling.repetition_penalty != 1.0:
        assert seen_bv is not None
        penalty = min(max(sampling.repetition_penalty, 1 / EXTREME), EXTREME)
        penalised_bv = torch.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)
        logits_bv = torch.where(seen_bv, penalised_bv, logits_bv)
    if sampling.greedy:
        return logits_bv
    logits_bv = logits_bv / min(sampling.temperature, EXTREME)
    if 0 < sampling.top_k < logits_bv.shape[-1]:
        threshold_b1 = logits_bv.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_bv = logits_bv.masked_fill(logits_bv < threshold_b1, -torch.inf)
    if sampling.top_p < 1.0:
        sorted_bv, order_bv = logits_bv.sort(dim=-1, descending=True)
        probabilities_bv = sorted_bv.softmax(dim=-1)
        # The token that crosses the threshold stays, so that at least one does.
        drop_bv = (probabilities_bv.cumsum(dim=-1) - probabilities_bv) >= sampling.top_p
        # Back to the order of the vocabulary; a scatter takes a tenth of the time of a second sort.
        logits_bv = logits_bv.masked_fill(
            torch.empty_like(drop_bv).scatter_(1, order_bv, drop_bv), -torch.inf
        )
    if sampling.min_p > 0.0:
        probabilities_bv = logits_bv.softmax(dim=-1)
        threshold_b1 = sampling.min_p * probabilities_bv.amax(dim=-1, keepdim=True)
        logits_bv = logits_bv.masked_fill(probabilities_bv < threshold_b1, -torch.inf)
    return logits_bv


def choose(
    logits_bv: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen_bv: Tensor | None = None,
) -> Tensor:
    """Sample the next token of each row, `[b]`.

    Each row has its own generator, so that its sample does not depend on its neighbours. `seen_bv`: see
    `candidates`. Raises `NoTokenError`, before any generator advances, where a row has no token to sample.
    """
    logits_bv = candidates(logits_bv, sampling, seen_bv)
    if sampling.greedy:
        # Twice as fast on CPU as `argmax`, and returns the first of equal ones too.
        return logits_bv.max(dim=-1).indices
    probabilities_bv = logits_bv.softmax(dim=-1)
    # Sampling from NaN would end a CUDA device's context, and every request with it.
    if not probabilities_bv.sum(dim=-1).isfinite().all():
        raise NoTokenError
    rows = [
        torch.multinomial(probabilities_bv[row], 1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(rows)


def log_probabilities(logits_bv: Tensor, tokens_b: Tensor) -> Tensor:
    """Return each token's natural log-probability under the unfiltered logits, `[b]`."""
    # One kernel over the vocabulary; `logsumexp` needs five.
    return logits_bv.float().log_softmax(dim=-1).gather(1, tokens_b[:, None])[:, 0]
