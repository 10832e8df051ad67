"""Placeholder until the merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chosen(NamedTuple):
    experts: Tensor
    gates: Tensor


def choose(probabilities: Tensor, k: int) -> Chosen:
    gates, experts = probabilities.topk(k, dim=-1)
    return Chosen(experts, gates)


def feed_forward_experts(x: Tensor, into: Tensor, out: Tensor, chosen: Chosen) -> Tensor:
    y = torch.zeros_like(x)
    for e in range(into.shape[0]):
        rows, col = torch.where(chosen.experts == e)
        gate, up = F.linear(x[rows], into[e]).chunk(2, -1)
        y = y.index_add(
            0, rows, F.linear(F.silu(gate) * up, out[e]) * chosen.gates[rows, col, None].to(x.dtype)
        )
    return y


def load_balancing_loss(probabilities: Tensor, experts: Tensor, counted: Tensor | None = None) -> Tensor:
    if counted is not None:
        probabilities, experts = probabilities[counted], experts[counted]
    n = probabilities.shape[-1]
    f = torch.bincount(experts.flatten(), minlength=n).to(probabilities.dtype) / experts.numel()
    return n * (f * probabilities.mean(0)).sum()


def router_z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    if counted is not None:
        logits = logits[counted]
    return logits.logsumexp(-1).square().mean()
