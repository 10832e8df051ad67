"""Routers of a mixture of experts: a score of each expert for each token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """Router outputs of one layer.

    Attributes:
        logits: `[batch, time, experts]` float32, of the feed-forward router.
        probabilities: their softmax.
        experts: `[batch, time, top_k]`, the experts that each token is assigned to.
        attention_logits: `[batch, time, experts]` of the attention router; None where attention is averaged.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    attention_logits: Tensor | None


class LinearRouter(nn.Module):
    """One row of weights for each expert (arXiv 2408.08274, section 3)."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from a normal distribution with standard deviation `std`."""
        nn.init.normal_(self.weight, 0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[..., experts]` in the dtype of `x`, `[..., hidden]`."""
        return F.linear(x, self.weight)


class DomainRouter(nn.Module):
    """Scores experts by a projection of their domains' embeddings (arXiv 2408.15901, section 3).

    The logit of expert i is `x . W2 SwiGLU(W1 d_i)`. `domains` `[experts, domain_size]` is fixed, with
    entries of unit variance. A new expert needs the embedding of its domain and no new weight. Without
    gradients the projected embeddings are cached until a weight changes.
    """

    domains: Tensor

    def __init__(self, hidden_size: int, experts: int, domain_size: int) -> None:
        super().__init__()
        self.register_buffer("domains", torch.zeros(experts, domain_size))
        self.into = nn.Parameter(torch.empty(2 * hidden_size, domain_size))
        self.out = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self._cache: tuple[tuple[object, ...], Tensor] | None = None

    def reset_parameters(self) -> None:
        """Initialise so that logits begin near 0 where the entries of `x` have unit variance.

        The paper names no initialisation; this one is ours.
        """
        nn.init.normal_(self.domains, 0.0, 1.0)
        nn.init.normal_(self.into, 0.0, 1.0 / math.sqrt(self.into.shape[1]))
        nn.init.normal_(self.out, 0.0, 1.0 / self.out.shape[1])

    def expert_embeddings(self) -> Tensor:
        """Return the projected embeddings of the domains, `[experts, hidden]`."""
        gate, up = F.linear(self.domains.to(self.into.dtype), self.into).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.out)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[..., experts]` in the dtype of `x`."""
        if torch.is_grad_enabled():
            return F.linear(x, self.expert_embeddings())
        key = tuple(
            (id(part), part.dtype, part.device, None if part.is_inference() else part._version)
            for part in (self.into, self.out, self.domains)
        )
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, self.expert_embeddings())
        return F.linear(x, self._cache[1])


def soft_gates(logits: Tensor, top_k: int | None) -> Tensor:
    """Return the softmax over the experts in float32, `[..., experts]`.

    With `top_k` all but the largest gates are 0, and the rest is not renormalised.
    """
    gates = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if top_k is None or top_k == gates.shape[-1]:
        return gates
    largest = gates.topk(top_k, dim=-1).indices
    return gates * torch.zeros_like(gates).scatter_(-1, largest, 1.0)
