"""Feed-forward experts wherever there is no grouped matmul: on CPU, above all.

Tokens are sorted by expert, so that each expert is two products over its own tokens, forward, and four backward; an expert that nobody chose costs nothing. One
autograd function holds all of it: no graph of a dozen operations an expert. An expert with few tokens is `koine.model.moe.cpu_kernels`, where that can be
compiled, because torch's products copy a matrix before they use it; groups of nearly equal size are one batched product, and all others one each, in float32 also
for bfloat16 where the processor is faster so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from koine.hardware import bfloat16_is_fast
from koine.model.moe import cpu_kernels as compiled_experts
from koine.model.moe.dispatch import FEW, Groups, Part, grouped, parts_of


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it without types
def sorted_by_expert(x: Tensor, into: Tensor, out: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    """`feed_forward_experts` everywhere but on an accelerator."""
    count, hidden, width = out.shape
    if x.shape[1] != hidden or into.shape != (count, 2 * width, hidden):
        raise ValueError(
            f"tokens {tuple(x.shape)}, into {tuple(into.shape)} and out {tuple(out.shape)} do not fit"
        )
    learning = torch.is_grad_enabled() and any(part.requires_grad for part in (x, into, out, gates))
    rows = experts.numel() / len(into)
    dtype = torch.float32 if rows > _mostly_few(x, keep=learning) and _is_slow(x) else x.dtype
    x_wide, into, out = (
        one.to(kind).contiguous() for one, kind in ((x, dtype), (into, x.dtype), (out, x.dtype))
    )
    inputs = x_wide, into, out, experts, gates.to(dtype)
    if not learning:
        return _answers(*inputs, keep=False).said.to(x.dtype)
    result = _FeedForwardExperts.apply(*inputs)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result.to(x.dtype)


MOSTLY_FEW = 48
"""Up to so many tokens an expert, on average, `koine.model.moe.cpu_kernels` takes each group as it is, up to its largest, where it can."""

MOSTLY_FEW_READ = 192
FEW_READ = 256
"""The same two numbers where nothing is learnt: a matrix may be read several times, for as many groups, but a gradient is written once."""


def _mostly_few(x: Tensor, *, keep: bool) -> int:
    return MOSTLY_FEW if keep or not compiled_experts.compiled_for(x) else MOSTLY_FEW_READ


def _is_slow(x: Tensor) -> bool:
    """Whether products of many rows are faster in float32, with the time that it takes to make the matrices float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not bfloat16_is_fast()


WIDENED = 2**19
"""Entries of a matrix that are made float32 at a time: 2 MB, which stay in the caches until they are multiplied."""


def _pieces(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A matrix in `dtype`, as it is or so many of its rows at a time as stay in the caches."""
    if matrix.dtype == dtype:
        yield slice(None), matrix
        return
    count = max(1, WIDENED // matrix.shape[1])
    memory = matrix.new_empty(min(count, len(matrix)), matrix.shape[1], dtype=dtype)
    for start in range(0, len(matrix), count):
        piece = matrix[start : start + count]
        yield slice(start, start + len(piece)), memory[: len(piece)].copy_(piece)


def _times_transposed(rows: Tensor, matrices: Tensor, part: Part, out: Tensor) -> Tensor:
    """Each expert's rows times its transposed matrix. rows: `[rows, in]`; matrices: `[experts, result, in]`; out: `[rows, result]`."""
    if not part.ends:
        shape = (len(matrices), len(rows) // len(matrices), -1)
        torch.bmm(rows.view(shape), matrices.transpose(1, 2), out=out.view(shape))
    for expert, start, end in part.ends:
        for piece, matrix in _pieces(matrices[expert], rows.dtype):
            if end - start <= FEW and rows.dtype == torch.float32:
                # Up to twice as fast on CPU as rows times columns (docs/explanation/log.md).
                out[start:end, piece] = torch.mm(matrix, rows[start:end].t()).t()
            else:
                torch.mm(rows[start:end], matrix.t(), out=out[start:end, piece])
    return out


def _times(rows: Tensor, matrices: Tensor, part: Part, out: Tensor) -> Tensor:
    """Each expert's rows times its matrix. rows: `[rows, in]`; matrices: `[experts, in, result]`; out: `[rows, result]`."""
    if not part.ends:
        shape = (len(matrices), len(rows) // len(matrices), -1)
        torch.bmm(rows.view(shape), matrices, out=out.view(shape))
    for expert, start, end in part.ends:
        here = out[start:end]
        for piece, matrix in _pieces(matrices[expert], rows.dtype):
            if piece.start:
                here.addmm_(rows[start:end, piece], matrix)
            else:
                torch.mm(rows[start:end, piece], matrix, out=here)
    return out


def _transposed_times(left: Tensor, right: Tensor, part: Part, out: Tensor) -> None:
    """Of each expert its rows on the left, transposed, times those on the right: the gradient of its matrix.

    left: `[rows, result]`; right: `[rows, in]`; out: `[experts, result, in]`.
    """
    if not part.ends:
        shape = (len(out), len(left) // len(out), -1)
        torch.bmm(left.view(shape).transpose(1, 2), right.view(shape), out=out)
    for expert, start, end in part.ends:
        if out.dtype == left.dtype:
            torch.mm(left[start:end].t(), right[start:end], out=out[expert])
            continue
        count = max(1, WIDENED // out.shape[2])
        for first in range(0, out.shape[1], count):
            columns = left[start:end, first : first + count]
            out[expert, first : first + count] = torch.mm(columns.t(), right[start:end])


class _Kept(NamedTuple):
    """What the backward pass needs: the rows that the experts read, and both halves of what they made of them."""

    picked: Tensor
    both: Tensor


class _ForwardResult(NamedTuple):
    """What the experts say of their rows, `[rows, hidden]`, and what the backward pass needs: for the few what `compiled_experts.forward` returned, for the
    others `_Kept`; None where there are none, or nothing is to be learnt."""

    said: Tensor
    halves: Tensor | None
    kept: _Kept | None


def _forward(x: Tensor, into: Tensor, out: Tensor, groups: Groups, *, keep: bool) -> _ForwardResult:
    rows, hidden, width = len(groups.tokens), x.shape[1], out.shape[2]
    said, halves = x.new_empty(rows, hidden), None
    if len(groups.few):
        halves = compiled_experts.forward(x, into, out, groups.tokens, groups.few, said, keep=keep)
    parts = parts_of(groups)
    if not parts:
        return _ForwardResult(said, halves, None)
    most = _most_rows(parts)
    # Where nothing is kept, one part works in the memory of the one before.
    room = rows if keep else most
    picked, both, units = x.new_empty(room, hidden), x.new_empty(room, 2 * width), x.new_empty(most, width)
    for part in parts:
        count = part.rows.stop - part.rows.start
        here = part.rows if keep else slice(0, count)
        read = torch.index_select(x, 0, groups.tokens[part.rows], out=picked[here])
        if groups.each:
            read.index_fill_(0, groups.filling, 0.0)
        made = _times_transposed(read, into, part, both[here])
        _swiglu(made, units[:count])
        _times_transposed(units[:count], out, part, said[part.rows])
    return _ForwardResult(said, halves, _Kept(picked, both) if keep else None)


def _most_rows(parts: list[Part]) -> int:
    return max(int(part.rows.stop) - int(part.rows.start) for part in parts)


class _Answers(NamedTuple):
    """What is said of each token, `[tokens, hidden]`, how, and of its rows."""

    said: Tensor
    groups: Groups
    of_rows: _ForwardResult


def _answers(x: Tensor, into: Tensor, out: Tensor, experts: Tensor, gates: Tensor, *, keep: bool) -> _Answers:
    """x and gates in one dtype, in which the products are; into and out in it or in a narrower one; x, into and out contiguous."""
    tokens, k = experts.shape
    may_be_few = into.dtype == x.dtype and compiled_experts.compiled_for(x)
    mostly_few = may_be_few and tokens * k <= _mostly_few(x, keep=keep) * len(into)
    may_fill = into.dtype == x.dtype and not mostly_few
    most = compiled_experts.MOST_ROWS if keep or not mostly_few else FEW_READ
    groups = grouped(experts, into, may_fill=may_fill, few=most if may_be_few else 0)
    of_rows = _forward(x, into, out, groups, keep=keep)
    # What is said of a token, weighted and added up in one pass over memory.
    said = F.embedding_bag(
        groups.place.view(tokens, k), of_rows.said, mode="sum", per_sample_weights=gates.contiguous()
    )
    return _Answers(said, groups, of_rows)


class _FeedForwardExperts(torch.autograd.Function):
    """See `_answers`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, into: Tensor, out: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        found = _answers(x, into, out, experts, gates, keep=True)
        ctx.groups = found.groups
        of_few = x if len(found.groups.few) else None
        rows = found.of_rows
        ctx.save_for_backward(of_few, into, out, gates, rows.said, rows.halves, *(rows.kept or ()))
        return found.said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, into, out, gates, said, halves, *kept = ctx.saved_tensors
        groups: Groups = ctx.groups
        tokens, k = gates.shape
        grad, grad_gates = grad.contiguous(), None
        if ctx.needs_input_grad[4]:
            by_token = said.index_select(0, groups.place).view(tokens, k, grad.shape[1])
            grad_gates = by_token.mul_(grad[:, None]).sum(dim=-1)
        weights = gates.new_zeros(len(groups.tokens))
        weights[groups.place] = gates.reshape(-1)
        found = _gradients(grad, into, out, groups, _Wanted(*ctx.needs_input_grad[:3]))
        if len(groups.few):
            compiled_experts.backward(grad, weights, x, into, out, groups.tokens, groups.few, halves, found)
        if kept:
            _backward(grad, weights, _Kept(*kept), into, out, groups, found)
        grad_x = None
        if found.rows is not None:
            grad_x = F.embedding_bag(groups.place.view(tokens, k), found.rows, mode="sum")
        return grad_x, found.into, found.out, None, grad_gates


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


def _swiglu(both: Tensor, units: Tensor) -> None:
    """Writes `silu(gate) * up`. both: `[rows, 2 * intermediate]`; units: `[rows, intermediate]`."""
    if compiled_experts.compiled_for(both):
        compiled_experts.swiglu(both, units)
        return
    gate, up = both.chunk(2, dim=1)
    torch.mul(F.silu(gate), up, out=units)


def _swiglu_backward(grad_units: Tensor, both: Tensor, grad_both: Tensor, units: Tensor) -> None:
    """Writes the gradient of both halves to `grad_both` and the units again to `units`; `grad_units` is used up."""
    if compiled_experts.compiled_for(both):
        compiled_experts.swiglu_backward(grad_units, both, grad_both, units)
        return
    gate, up = both.chunk(2, dim=1)
    grad_gate, grad_up = grad_both.chunk(2, dim=1)
    active = F.silu(gate)
    torch.mul(active, up, out=units)
    torch.mul(grad_units, active, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_units.mul_(up), gate, grad_input=grad_gate)


def _gather(tokens: Tensor, numbers: Tensor, weights: Tensor, to: Tensor) -> Tensor:
    """The tokens of these numbers, each times its weight, written to `to` `[rows, hidden]`."""
    if compiled_experts.compiled_for(tokens):
        compiled_experts.gather(tokens, numbers, weights, to)
        return to
    return torch.index_select(tokens, 0, numbers, out=to).mul_(weights[:, None])


def _gradients(grad: Tensor, into: Tensor, out: Tensor, groups: Groups, wanted: _Wanted) -> _Gradients:
    """Memory for what is asked for; 0 for experts that nobody chose."""
    found = _Gradients(
        grad.new_empty(len(groups.tokens), grad.shape[1]) if wanted.x else None,
        torch.empty_like(into) if wanted.into else None,
        torch.empty_like(out) if wanted.out else None,
    )
    if not groups.each:
        chosen = {int(expert) for expert in groups.few[:, 0]} | {expert for expert, _, _ in groups.others}
        for expert in set(range(len(into))) - chosen:
            for one in found[1:]:
                if one is not None:
                    one[expert].zero_()
    return found


def _backward(
    grad: Tensor,
    weights: Tensor,
    kept: _Kept,
    into: Tensor,
    out: Tensor,
    groups: Groups,
    found: _Gradients,
) -> None:
    """Writes the gradients of all but the few to `found`. grad: `[tokens, hidden]`; weights: `[rows]`, the gate of each."""
    parts, width = parts_of(groups), out.shape[2]
    sizes = (grad.shape[1], width, width, 2 * width)
    memory = [grad.new_empty(_most_rows(parts), size) for size in sizes]
    for part in parts:
        here, count = part.rows, part.rows.stop - part.rows.start
        said, units, product, both = (one[:count] for one in memory)
        grad_said = _gather(grad, groups.tokens[here], weights[here], said)
        if groups.each:
            grad_said.index_fill_(0, groups.filling, 0.0)
        _swiglu_backward(_times(grad_said, out, part, units), kept.both[here], both, product)
        # All matrices are read before a gradient is written, which would drive them from the caches.
        if found.rows is not None:
            _times(both, into, part, found.rows[here])
        if found.into is not None:
            _transposed_times(both, kept.picked[here], part, found.into)
        if found.out is not None:
            _transposed_times(grad_said, product, part, found.out)
