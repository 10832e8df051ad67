"""Routers of a mixture: scores of the experts for each token."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Routing(NamedTuple):
    """What the routers of one layer said about each token.

    logits: `[batch, time, experts]`, float32, of the feed-forward router; probabilities: their softmax; experts: `[batch, time, top_k]`, the assigned ones.
    attention_logits: those of the attention router; None where the attention is averaged.
    """

    logits: Tensor
    probabilities: Tensor
    experts: Tensor
    attention_logits: Tensor | None


class LinearRouter(nn.Module):
    """One row of weights an expert: `[..., hidden]` to logits `[..., experts]` (arXiv 2408.08274, section 3)."""

    def __init__(self, hidden_size: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))

    def reset_parameters(self, std: float) -> None:
        """Normal with the standard deviation `std`."""
        nn.init.normal_(self.weight, 0.0, std)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, in the dtype of `x`."""
        return F.linear(x, self.weight)


class DomainRouter(nn.Module):
    """Experts are scored by a projection of their domains' embeddings: `x . W2 SwiGLU(W1 d_i)` (arXiv 2408.15901, section 3).

    `domains` `[experts, domain_size]`, with entries of unit variance, is fixed. A new expert needs its domain's embedding and no new weight. In a model
    that only reads, the projected embeddings are worked out once and kept until a weight changes.
    """

    domains: Tensor

    def __init__(self, hidden_size: int, experts: int, domain_size: int) -> None:
        super().__init__()
        self.register_buffer("domains", torch.zeros(experts, domain_size))
        self.into = nn.Parameter(torch.empty(2 * hidden_size, domain_size))
        self.out = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def reset_parameters(self) -> None:
        """Scaled so that logits begin near 0 where the entries of `x` have unit variance. The paper names no initialisation; this is ours."""
        nn.init.normal_(self.domains, 0.0, 1.0)
        nn.init.normal_(self.into, 0.0, 1.0 / math.sqrt(self.into.shape[1]))
        nn.init.normal_(self.out, 0.0, 1.0 / self.out.shape[1])

    def expert_embeddings(self) -> Tensor:
        """`[experts, hidden]`."""
        gate, up = F.linear(self.domains.to(self.into.dtype), self.into).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.out)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[..., experts]`, in the dtype of `x`."""
        if torch.is_grad_enabled():
            return F.linear(x, self.expert_embeddings())
        key = tuple(
            (id(part), part.dtype, part.device, None if part.is_inference() else part._version)
            for part in (self.into, self.out, self.domains)
        )
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.expert_embeddings())
        return F.linear(x, self._kept[1])


def soft_gates(logits: Tensor, top_k: int | None) -> Tensor:
    """Softmax over the experts `[..., experts]`, in float32; with `top_k` all but the largest are 0, and the rest is not renormalised."""
    gates = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if top_k is None or top_k == gates.shape[-1]:
        return gates
    chosen = gates.topk(top_k, dim=-1).indices
    return gates * torch.zeros_like(gates).scatter_(-1, chosen, 1.0)
