"""Feed-forward experts: which tokens go to which, and what the chosen ones say.

Tokens are sorted by expert, so that each expert is two matmuls over its own tokens, forward, and four backward; an expert that nobody chose
costs nothing. One autograd function holds all of it: no graph of a dozen operations an expert, and every product is written where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """
    gates = chosen.gates.to(x.dtype)
    if x.device.type == "cuda":
        return _on_accelerator(x, into, out, Chosen(chosen.experts, gates))
    result = _FeedForwardExperts.apply(x, into.to(x.dtype), out.to(x.dtype), chosen.experts, gates)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _Groups(NamedTuple):
    """Choices sorted by expert.

    rows: `[choices]`, the token of each. place: `[tokens * k]`, where each token's choices went. ends: `[(expert, start, end)]` of the experts
    that were chosen.
    """

    rows: Tensor
    place: Tensor
    ends: tuple[tuple[int, int, int], ...]


def _grouped(experts: Tensor, count: int) -> _Groups:
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return _Groups(
        order // experts.shape[1], place, tuple(_runs(torch.bincount(flat, minlength=count).tolist()))
    )


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, number in enumerate(counts):
        if number:
            yield expert, start, start + number
        start += number


class _FeedForwardExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, out: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        tokens, k = experts.shape
        groups = _grouped(experts, into.shape[0])
        picked = x.index_select(0, groups.rows)
        both = x.new_empty(len(picked), into.shape[1])
        for expert, start, end in groups.ends:
            torch.mm(picked[start:end], into[expert].t(), out=both[start:end])
        gate, up = both.chunk(2, dim=-1)
        units = F.silu(gate).mul_(up)
        said = torch.empty_like(picked)
        for expert, start, end in groups.ends:
            torch.mm(units[start:end], out[expert].t(), out=said[start:end])
        by_token = said.index_select(0, groups.place).view(tokens, k, x.shape[1])
        ctx.groups = groups
        ctx.save_for_backward(picked, into, out, gates, both, units, by_token)
        return torch.bmm(gates[:, None], by_token)[:, 0] if k > 1 else by_token[:, 0] * gates

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, into, out, gates, both, units, by_token = ctx.saved_tensors
        groups: _Groups = ctx.groups
        tokens, k = gates.shape
        grad_gates = torch.bmm(by_token, grad[:, :, None])[..., 0] if ctx.needs_input_grad[4] else None
        # Sorted by expert again: where each choice's gate stands is the inverse of where it went.
        weights = torch.empty_like(gates.reshape(-1))
        weights[groups.place] = gates.reshape(-1)
        grad_said = grad.index_select(0, groups.rows).mul_(weights[:, None])
        width = units.shape[1]
        grad_units = torch.empty_like(units)
        grad_out = _gradient_like(out, groups) if ctx.needs_input_grad[2] else None
        for expert, start, end in groups.ends:
            torch.mm(grad_said[start:end], out[expert], out=grad_units[start:end])
            if grad_out is not None:
                torch.mm(grad_said[start:end].t(), units[start:end], out=grad_out[expert])
        gate, up = both.chunk(2, dim=-1)
        grad_both = torch.empty_like(both)
        torch.mul(grad_units, F.silu(gate), out=grad_both[:, width:])
        torch.ops.aten.silu_backward.grad_input(grad_units.mul_(up), gate, grad_input=grad_both[:, :width])
        grad_picked = torch.empty_like(picked)
        grad_into = _gradient_like(into, groups) if ctx.needs_input_grad[1] else None
        for expert, start, end in groups.ends:
            torch.mm(grad_both[start:end], into[expert], out=grad_picked[start:end])
            if grad_into is not None:
                torch.mm(grad_both[start:end].t(), picked[start:end], out=grad_into[expert])
        grad_x = grad_picked.index_select(0, groups.place)
        if k > 1:
            grad_x = grad_x.view(tokens, k, grad.shape[1]).sum(dim=1)
        return grad_x, grad_into, grad_out, None, grad_gates


def _gradient_like(weight: Tensor, groups: _Groups) -> Tensor:
    """Room for the gradient of every expert; zeros for those that nobody chose."""
    room = torch.empty_like(weight)
    chosen = {expert for expert, _, _ in groups.ends}
    for expert in range(weight.shape[0]):
        if expert not in chosen:
            room[expert].zero_()
    return room


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


def load_balancing_loss(probabilities: Tensor, experts: Tensor, counted: Tensor | None = None) -> Tensor:
    """`N sum_i f_i P_i`, a scalar: 1 where the load is even, `N` where one expert has all (arXiv 2408.08274, equation 6).

    Args:
        probabilities: `[tokens, experts]`, whose mean is `P`.
        experts: `[tokens, k]`, the chosen ones; `f` is the share of the `tokens * k` choices.
        counted: `[tokens]` bool, False for padding.
    """
    if counted is not None:
        probabilities, experts = probabilities[counted], experts[counted]
    count = probabilities.shape[-1]
    share = torch.bincount(experts.flatten(), minlength=count).to(probabilities.dtype) / max(
        1, experts.numel()
    )
    mean = probabilities.sum(dim=0) / max(1, len(probabilities))
    return count * (share * mean).sum()


def router_z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """The mean over tokens of `logsumexp(logits)^2`, a scalar (arXiv 2202.08906, equation 5). logits: `[tokens, experts]`; counted as above."""
    if counted is not None:
        logits = logits[counted]
    return logits.logsumexp(dim=-1).square().sum() / max(1, len(logits))
