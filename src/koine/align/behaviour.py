"""Figures of a policy's behaviour: entropy, diversity, repetition, divergence, and how it ranks pairs.

Definitions: arXiv 2410.11677 (entropy and mass of the top 10, EAD over n = 1 to 5, likelihoods that are not
divided by the reference's). Shape suffixes: n positions, v vocabulary, k top tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOP = 10
"""Tokens of the top-k entropy and mass."""
ORDERS = (1, 2, 3, 4, 5)
"""Lengths of the n-grams of EAD."""
REPEATED = 4
"""Length of the n-grams that repetition counts."""
HIGHER_IS_BETTER = frozenset({"accuracy", "asked_language", "chosen", "margin", "mass", "reward"})
LOWER_IS_BETTER = frozenset({"error", "kl", "kl_sequence", "repetition", "cut_off", "reward_failures"})
"""Figures with a direction, by their name before the first `/`. Entropy, EAD and length have none."""


class TopTokens(NamedTuple):
    """The likeliest next tokens of each position, `[n]` float32 each.

    entropy: bits, of the k probabilities divided by their sum.
    raw_entropy: bits, -sum p log2 p of the k probabilities as they are; it also falls with their mass.
    mass: sum of the k probabilities.
    """

    entropy: Tensor
    raw_entropy: Tensor
    mass: Tensor


def top_tokens(logits_nv: Tensor, k: int = TOP) -> TopTokens:
    """Compute entropy and mass of the `k` likeliest next tokens; all tokens where there are fewer."""
    p_nk = logits_nv.float().softmax(dim=-1).topk(min(k, logits_nv.shape[-1]), dim=-1).values
    mass_n = p_nk.sum(dim=-1)
    renormalised_nk = p_nk / mass_n[:, None]
    return TopTokens(_bits(renormalised_nk), _bits(p_nk), mass_n)


def _bits(p_nk: Tensor) -> Tensor:
    nats_n: Tensor = -torch.special.xlogy(p_nk, p_nk).sum(dim=-1)
    return nats_n / math.log(2)


def divergence(policy_nv: Tensor, reference_nv: Tensor) -> Tensor:
    """Return KL(policy || reference) of the next-token distributions at each position, `[n]` nats.

    Exact over the vocabulary. Averaged over the positions of the policy's own samples it is the per-token KL:
    the same mean as log p - log r of the sampled tokens, with less variance. Logits of a larger vocabulary are
    cut to the smaller one.
    """
    size = min(policy_nv.shape[-1], reference_nv.shape[-1])
    policy_nv = policy_nv[:, :size].float().log_softmax(dim=-1)
    reference_nv = reference_nv[:, :size].float().log_softmax(dim=-1)
    return (policy_nv.exp() * (policy_nv - reference_nv)).sum(dim=-1)


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the n-grams of a sequence, in order."""
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]


def expectation_adjusted_distinct(texts: Sequence[Sequence[int]], n: int, vocab_size: int) -> float:
    """Return EAD, the cross-input diversity: distinct n-grams over those expected by chance.

    `N / (V * (1 - ((V - 1) / V) ** C))`, with N distinct and C total n-grams of all texts (n-grams do not cross
    texts), and V the size of the vocabulary for every n, as in the paper. So it may exceed 1 for n > 1. 0 where
    no text has n tokens.
    """
    found = [gram for tokens in texts for gram in ngrams(tokens, n)]
    if not found:
        return 0.0
    expected = vocab_size * -math.expm1(len(found) * math.log1p(-1 / vocab_size))
    return len(set(found)) / expected


def repetition(tokens: Sequence[int], n: int = REPEATED) -> float:
    """Return the share of a text's n-grams that occurred earlier in it; 0 where it has none."""
    found = ngrams(tokens, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def direction(name: str) -> int:
    """Return 1 for a figure of which more is better, -1 for one of which less is, 0 for others."""
    base = name.partition("/")[0]
    return (base in HIGHER_IS_BETTER) - (base in LOWER_IS_BETTER)


def worst_language(values: dict[str, float], name: str) -> str | None:
    """Return the language with the worst value of a figure; None for a figure without a direction."""
    sign = direction(name)
    if not sign or len(values) < 2:
        return None
    return min(values, key=lambda code: (sign * values[code], code))
