"""Feed-forward experts: which tokens go to which, and what the chosen ones say.

Tokens are sorted by expert, so that each expert is two matmuls over its own tokens, forward, and four backward; an expert that nobody chose
costs nothing. Small groups of nearly equal size are one batched matmul. One autograd function holds all of it: no graph of a dozen operations an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
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
    learning = torch.is_grad_enabled() and any(part.requires_grad for part in (x, into, out, gates))
    result = _FeedForwardExperts.apply(  # type: ignore[no-untyped-call]
        x, into.to(x.dtype), out.to(x.dtype), chosen.experts, gates, learning
    )
    assert isinstance(result, Tensor)
    return result


PADDED: tuple[tuple[int, float], ...] = ((48, 1.5), (256, 1.2))
"""Up to so many tokens an expert, groups are filled up to the longest where that makes at most so many times as many rows: one batched matmul of many small
matrices is up to twice as fast as one each (docs/log.md). Beyond, it is worth 1.03."""

PADDED_BEYOND = 1.03

LARGE = 2**20
"""Entries of a matrix from which on its product is no longer held up by the call itself: rows are then not filled up, but where products lie in columns
(docs/log.md)."""

IN_COLUMNS: tuple[tuple[int, float], ...] = ((32, 2.1), (256, 1.25))
"""The same table where products lie in columns (see `_in_columns`)."""

FEW = 32
"""Up to so many tokens an expert, large matrices are worth filling up for where products lie in columns."""

STRIDE = 16
"""Columns at a time: a group of a multiple of it costs no more than a shorter one."""


class _Groups(NamedTuple):
    """Choices sorted by expert, in rows.

    tokens: `[rows]`, the token of each row. place: `[tokens * k]`, the row of each choice. ends: `[(expert, start, end)]` of the experts that were
    chosen. each: rows an expert where all have as many, filled up with rows that are no choice (their token is 0 and nothing reads what is said to it);
    0 where each has as many as it has choices.
    """

    tokens: Tensor
    place: Tensor
    ends: tuple[tuple[int, int, int], ...]
    each: int


def _grouped(experts: Tensor, weight: Tensor, *, in_columns: bool) -> _Groups:
    """`weight`: one of the experts' matrices, `[experts, ...]`; in_columns: see `_in_columns`."""
    # With numpy: it sorts numbers of 16 bits by counting them (24 µs for 8,192 choices, torch 240), and a call takes it a microsecond.
    flat = experts.reshape(-1).cpu().numpy()
    order = flat.astype(np.uint16).argsort(kind="stable")
    counts = np.bincount(flat, minlength=len(weight))
    ends = tuple(_runs(counts.tolist()))
    row, tokens = np.arange(order.size), order // experts.shape[1]
    each = _filled_up(counts.tolist(), weight[0].numel(), in_columns=in_columns)
    if each:
        row += np.repeat(np.arange(counts.size) * each - (counts.cumsum() - counts), counts)
        chosen, tokens = tokens, np.zeros(counts.size * each, dtype=np.int64)
        tokens[row] = chosen
        ends = tuple((number, number * each, (number + 1) * each) for number in range(counts.size))
    place = np.empty_like(order)
    place[order] = row
    on = experts.device
    return _Groups(torch.from_numpy(tokens).to(on), torch.from_numpy(place).to(on), ends, each)


def _runs(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, number in enumerate(counts):
        if number:
            yield expert, start, start + number
        start += number


def _filled_up(counts: list[int], entries: int, *, in_columns: bool) -> int:
    """The rows that each expert gets where it pays to give all as many, else 0; an expert that nobody chose gets none. entries: of its matrix."""
    total, largest = sum(counts), max(counts)
    if not total or not min(counts):
        return 0
    if entries >= LARGE and not (in_columns and total <= FEW * len(counts)):
        return 0
    if in_columns:
        largest = -(-largest // STRIDE) * STRIDE
    table = IN_COLUMNS if in_columns else PADDED
    allowed = next((factor for most, factor in table if total <= most * len(counts)), PADDED_BEYOND)
    return largest if largest * len(counts) <= allowed * total else 0


class _ForwardResult(NamedTuple):
    """What the experts say of their rows, `[rows, hidden]`, and what the backward pass needs: their inputs, both halves, and the gate's half activated
    (None where nothing is to be learnt)."""

    said: Tensor
    kept: tuple[Tensor, Tensor, Tensor] | None


def _in_columns(x: Tensor) -> bool:
    """Whether a matrix times columns is faster than rows times its transpose, where there are few: up to 1.8 times in float32 on CPU (docs/log.md)."""
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _forward(x: Tensor, into: Tensor, out: Tensor, groups: _Groups, *, keep: bool) -> _ForwardResult:
    if groups.each and not keep and _in_columns(x):
        columns = x.index_select(0, groups.tokens).view(len(into), groups.each, -1).transpose(1, 2)
        gate, up = torch.bmm(into, columns).chunk(2, dim=1)
        said = torch.bmm(out, F.silu(gate).mul_(up)).transpose(1, 2)
        return _ForwardResult(said.reshape(-1, x.shape[1]), None)
    if groups.each:
        picked = x.index_select(0, groups.tokens)
        three = (len(into), groups.each, -1)
        both = torch.bmm(picked.view(three), into.transpose(1, 2)).flatten(0, 1)
        gate, up = both.chunk(2, dim=-1)
        active = F.silu(gate)
        said = torch.bmm((active * up).view(three), out.transpose(1, 2)).flatten(0, 1)
        return _ForwardResult(said, (picked, both, active) if keep else None)
    rows, width = len(groups.tokens), out.shape[2]
    said = x.new_empty(rows, x.shape[1])
    if not keep:
        # An expert from beginning to end while what it works on is in the caches, and the next in the same memory.
        most = max((end - start for _, start, end in groups.ends), default=0)
        read, worked = x.new_empty(most, x.shape[1]), x.new_empty(most, 2 * width)
        for expert, start, end in groups.ends:
            picked = torch.index_select(x, 0, groups.tokens[start:end], out=read[: end - start])
            both = torch.mm(picked, into[expert].t(), out=worked[: end - start])
            units = F.silu(both[:, :width], inplace=True).mul_(both[:, width:])
            torch.mm(units, out[expert].t(), out=said[start:end])
        return _ForwardResult(said, None)
    picked = x.index_select(0, groups.tokens)
    both, active = x.new_empty(rows, 2 * width), x.new_empty(rows, width)
    for expert, start, end in groups.ends:
        part = torch.mm(picked[start:end], into[expert].t(), out=both[start:end])
        lit = torch.ops.aten.silu.out(part[:, :width], out=active[start:end])
        torch.mm(lit * part[:, width:], out[expert].t(), out=said[start:end])
    return _ForwardResult(said, (picked, both, active))


class _FeedForwardExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, into: Tensor, out: Tensor, experts: Tensor, gates: Tensor, learning: bool
    ) -> Tensor:
        tokens, k = experts.shape
        groups = _grouped(experts, into, in_columns=not learning and _in_columns(x))
        said, kept = _forward(x, into, out, groups, keep=learning)
        if kept is not None:
            picked, both, active = kept
            ctx.groups = groups
            # The products of active and up are worked out again: a multiplication, where silu would be an exponential.
            ctx.save_for_backward(picked, into, out, gates, both, active, said)
        # What is said of a token, weighted and added up in one pass over memory.
        return F.embedding_bag(
            groups.place.view(tokens, k), said, mode="sum", per_sample_weights=gates.contiguous()
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picked, into, out, gates, both, active, said = ctx.saved_tensors
        groups: _Groups = ctx.groups
        tokens, k = gates.shape
        grad_gates = None
        if ctx.needs_input_grad[4]:
            by_token = said.index_select(0, groups.place).view(tokens, k, grad.shape[1])
            grad_gates = by_token.mul_(grad[:, None]).sum(dim=-1)
        # Rows that are no choice have a weight of 0, so that they reach no gradient.
        weights = gates.new_zeros(len(picked))
        weights[groups.place] = gates.reshape(-1)
        wanted = _Wanted(*ctx.needs_input_grad[:3])
        run_backward = _backward_batched if groups.each else _backward_in_turn
        kept_parts = _Kept(picked, both, active, into, out)
        found = run_backward(grad, weights, kept_parts, groups, wanted)
        grad_x = None
        if found.rows is not None:
            grad_x = F.embedding_bag(groups.place.view(tokens, k), found.rows, mode="sum")
        return grad_x, found.into, found.out, None, grad_gates, None


class _Kept(NamedTuple):
    """What the backward pass needs: the rows that the experts read, both halves of what they made of them, the gate's half activated, and the matrices."""

    picked: Tensor
    both: Tensor
    active: Tensor
    into: Tensor
    out: Tensor


class _Wanted(NamedTuple):
    """Which gradients of `_forward` are asked for."""

    x: bool
    into: bool
    out: bool


class _Gradients(NamedTuple):
    """Of the rows that the experts read `[rows, hidden]`, and of their matrices; None where not asked for."""

    rows: Tensor | None
    into: Tensor | None
    out: Tensor | None


def _grad_both(grad_units: Tensor, both: Tensor, active: Tensor, into: Tensor) -> Tensor:
    """The gradient of both halves from that of their product, written to `into`; `grad_units` is used up."""
    width = active.shape[1]
    torch.mul(grad_units, active, out=into[:, width:])
    torch.ops.aten.silu_backward.grad_input(
        grad_units.mul_(both[:, width:]), both[:, :width], grad_input=into[:, :width]
    )
    return into


def _backward_in_turn(
    grad: Tensor, weights: Tensor, kept_parts: _Kept, groups: _Groups, wanted: _Wanted
) -> _Gradients:
    """The backward pass of `_forward`: an expert from beginning to end while what it works on is in the caches, and the next in the same memory."""
    picked, both, active, into, out = kept_parts
    width = active.shape[1]
    grad_rows = torch.empty_like(picked) if wanted.x else None
    grad_into = torch.empty_like(into) if wanted.into else None
    grad_out = torch.empty_like(out) if wanted.out else None
    most = max((end - start for _, start, end in groups.ends), default=0)
    said, units, worked = (grad.new_empty(most, size) for size in (grad.shape[1], width, 2 * width))
    for expert, start, end in groups.ends:
        here, count = slice(start, end), end - start
        grad_said = torch.index_select(grad, 0, groups.tokens[here], out=said[:count])
        grad_said.mul_(weights[here, None])
        if grad_out is not None:
            product = torch.mul(active[here], both[here, width:], out=units[:count])
            torch.mm(grad_said.t(), product, out=grad_out[expert])
        if grad_into is None and grad_rows is None:
            continue
        grad_units = torch.mm(grad_said, out[expert], out=units[:count])
        part = _grad_both(grad_units, both[here], active[here], worked[:count])
        if grad_into is not None:
            torch.mm(part.t(), picked[here], out=grad_into[expert])
        if grad_rows is not None:
            torch.mm(part, into[expert], out=grad_rows[here])
    for expert in set(range(len(into))) - {number for number, _, _ in groups.ends}:
        for one in (grad_into, grad_out):
            if one is not None:
                one[expert].zero_()
    return _Gradients(grad_rows, grad_into, grad_out)


def _backward_batched(
    grad: Tensor, weights: Tensor, kept_parts: _Kept, groups: _Groups, wanted: _Wanted
) -> _Gradients:
    """The same for groups of one size, all experts at once."""
    picked, both, active, into, out = kept_parts
    experts, width = len(into), active.shape[1]

    def by_expert(rows: Tensor) -> Tensor:
        return rows.view(experts, groups.each, -1)

    grad_said = by_expert(grad.index_select(0, groups.tokens).mul_(weights[:, None]))
    product = by_expert(active * both[:, width:])
    grad_out = torch.bmm(grad_said.transpose(1, 2), product) if wanted.out else None
    grad_units = torch.bmm(grad_said, out).flatten(0, 1)
    part = by_expert(_grad_both(grad_units, both, active, torch.empty_like(both)))
    grad_into = torch.bmm(part.transpose(1, 2), by_expert(picked)) if wanted.into else None
    grad_rows = torch.bmm(part, into).flatten(0, 1) if wanted.x else None
    return _Gradients(grad_rows, grad_into, grad_out)


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
