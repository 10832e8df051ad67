"""Feed-forward experts: which tokens go to which, and what the chosen ones say."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.model.moe.cpu_grouped import sorted_by_expert


class Chosen(NamedTuple):
    """Which experts each token goes to, and with what weight.

    experts: `[tokens, k]` int64. gates: `[tokens, k]`.
    """

    experts: Tensor
    gates: Tensor


def choose(probabilities: Tensor, k: int) -> Chosen:
    """The `k` most probable experts of each token, with their probabilities as they are: gates are not renormalised (arXiv 2408.08274
    and 2408.15901).

    probabilities: `[tokens, experts]`.
    """
    gates, experts = probabilities.topk(k, dim=-1)
    return Chosen(experts, gates)


def feed_forward_experts(x: Tensor, into: Tensor, out: Tensor, chosen: Chosen) -> Tensor:
    """The sum over the chosen experts of `gate * out_e (silu(gate_e x) * (up_e x))`: SwiGLU experts.

    Args:
        x: `[tokens, hidden]`.
        into: `[experts, 2 * intermediate, hidden]`, the gate's rows, then up's.
        out: `[experts, hidden, intermediate]`.
        chosen: see `choose`; the products are in the dtype of `x`.

    Returns:
        `[tokens, hidden]`, differentiable once in `x`, `into`, `out` and the gates.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: an expert that there is not.
    """
    gates = chosen.gates.to(x.dtype)
    if x.device.type == "cuda":
        return _on_accelerator(x, into, out, Chosen(chosen.experts, gates))
    found: Tensor = sorted_by_expert(x, into, out, chosen.experts, gates)
    return found


def _on_accelerator(x: Tensor, into: Tensor, out: Tensor, chosen: Chosen) -> Tensor:
    """The same with torch's grouped matmul: the counts stay on the device, and nothing waits for them."""
    tokens, k = chosen.experts.shape
    flat = chosen.experts.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=into.shape[0]).cumsum(0).to(torch.int32)
    picked = x.index_select(0, order // k)
    both = _grouped_mm(picked, into.to(x.dtype).transpose(1, 2), ends)
    gate, up = both.chunk(2, dim=-1)
    said = _grouped_mm(F.silu(gate) * up, out.to(x.dtype).transpose(1, 2), ends)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    by_token = said.index_select(0, place).view(tokens, k, x.shape[1])
    return (by_token * chosen.gates[..., None]).sum(dim=1)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x` `[rows, in]` sorted by expert times `weight` `[experts, in, out]`; `ends` `[experts]` int32, where each expert's rows end."""
    if x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        found: Tensor = F.grouped_mm(x, weight, offs=ends)
        return found
    parts = torch.tensor_split(x, ends[:-1].cpu().long())
    return torch.cat([part @ one for part, one in zip(parts, weight, strict=True)])
