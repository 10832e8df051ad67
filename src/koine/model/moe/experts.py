"""Gated experts (SwiGLU, GeGLU): tokens are sorted by expert and multiplied by grouped matmuls.

Shape suffixes:
    t: tokens; k: experts of each token; n: rows sorted by expert, `t * k` in all; e: experts;
    d: hidden size of the model; f: intermediate size of an expert; g: `2 * f`, the gate, then up.

CUDA uses torch's grouped matmul, with counts that stay on the device. CPU uses one autograd function: the
backward passes of indexing and chunking would take as long there as the products of a small model.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from koine.hardware import bfloat16_is_fast, processor_flags
from koine.model.config import Activation
from koine.model.feed_forward import activate
from koine.model.uncompiled import uncompiled

GROUPED_ROWS = 128
"""Rows of each expert, on average, up to which CPU multiplies all experts in one grouped matmul.

With more, one expert at a time goes through all operations, while its rows are in the caches
(docs/explanation/log.md).
"""

BFLOAT16_ROWS = 48
"""Rows of each expert, on average, up to which slow bfloat16 instructions are used all the same.

Converting the weights to float32 takes longer than its products save (docs/explanation/log.md).
"""


class Assignments(NamedTuple):
    """The experts of each token, and their weights.

    Attributes:
        experts: `[tokens, k]` int64.
        gates: `[tokens, k]`.
    """

    experts: Tensor
    gates: Tensor


def assign_top_k(probabilities: Tensor, k: int, *, normalise: bool = False) -> Assignments:
    """Assign each token to its `k` most probable experts.

    The gates are their probabilities, not renormalised in arXiv 2408.08274 and 2408.15901.

    Args:
        probabilities: `[tokens, experts]`.
        k: experts of each token.
        normalise: divide the gates of a token by their sum (Mixtral, arXiv 2401.04088).
    """
    gates, experts = probabilities.topk(k, dim=-1)
    return Assignments(experts, gates / gates.sum(dim=-1, keepdim=True) if normalise else gates)


def feed_forward_experts(
    x: Tensor, w_in: Tensor, w_out: Tensor, assignments: Assignments, activation: Activation = "silu"
) -> Tensor:
    """Compute `sum_e gate_e * w_out_e (activation(w_gate_e x) * (w_up_e x))` over each token's experts.

    Args:
        x: `[tokens, hidden]`. Products are in its dtype; on CPU in float32 where bfloat16 is slower.
        w_in: `[experts, 2 * intermediate, hidden]`, the rows of `w_gate`, then those of `w_up`.
        w_out: `[experts, hidden, intermediate]`.
        assignments: see `assign_top_k`.
        activation: of the gates' units.

    Returns:
        `[tokens, hidden]` in the dtype of `x`. It is differentiable in `x`, `w_in`, `w_out` and the gates, on
        CPU once.

    Raises:
        ValueError: shapes do not fit.
        IndexError: a token is assigned to an expert that does not exist (on CPU).
    """
    count, hidden, width = w_out.shape
    if x.shape[1] != hidden or w_in.shape != (count, 2 * width, hidden):
        raise ValueError(
            f"tokens {tuple(x.shape)}, w_in {tuple(w_in.shape)} and w_out {tuple(w_out.shape)} do not fit"
        )
    w_in, w_out = w_in.to(x.dtype).contiguous(), w_out.to(x.dtype).contiguous()
    experts, gates = assignments.experts, assignments.gates.to(x.dtype)
    if x.device.type == "cuda":
        return _cuda_experts(x, w_in, w_out, experts, gates, activation)
    out: Tensor = _cpu_experts(x, w_in, w_out, experts, gates, activation)
    return out


def _has_grouped_mm(dtype: torch.dtype, w_out_edf: Tensor) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes these experts.

    It needs matrix rows of a multiple of 16 bytes.
    """
    on_device = (torch.float32, torch.bfloat16) if w_out_edf.device.type == "cpu" else (torch.bfloat16,)
    return dtype in on_device and all(size % 8 == 0 for size in w_out_edf.shape[1:])


# -- CUDA ----------------------------------------------------------------------------------------------------


def _cuda_experts(
    x_td: Tensor,
    w_in_egd: Tensor,
    w_out_edf: Tensor,
    experts_tk: Tensor,
    gates_tk: Tensor,
    activation: Activation,
) -> Tensor:
    order_n = experts_tk.flatten().argsort(stable=True)
    ends_e = torch.bincount(experts_tk.flatten(), minlength=len(w_in_egd)).cumsum(0).to(torch.int32)
    times = F.grouped_mm if _has_grouped_mm(x_td.dtype, w_out_edf) else _matmul_each
    x_nd = x_td.index_select(0, order_n // experts_tk.shape[1])
    gate_nf, up_nf = times(x_nd, w_in_egd.transpose(1, 2), offs=ends_e).chunk(2, dim=-1)
    expert_out_nd = times(activate(gate_nf, activation) * up_nf, w_out_edf.transpose(1, 2), offs=ends_e)
    row_n = torch.empty_like(order_n)
    row_n[order_n] = torch.arange(len(order_n), device=order_n.device)
    expert_out_tkd = expert_out_nd.index_select(0, row_n).view(*experts_tk.shape, -1)
    return (expert_out_tkd * gates_tk[..., None]).sum(dim=1)


def _matmul_each(x_nx: Tensor, w_exy: Tensor, *, offs: Tensor) -> Tensor:
    """Do the work of `grouped_mm` with a matmul for each expert; the CPU waits for the counts."""
    x_parts = torch.tensor_split(x_nx, offs[:-1].cpu().long())
    return torch.cat([x_part @ w_xy for x_part, w_xy in zip(x_parts, w_exy, strict=True)])


# -- CPU -----------------------------------------------------------------------------------------------------


@uncompiled
def _cpu_experts(
    x_td: Tensor,
    w_in_egd: Tensor,
    w_out_edf: Tensor,
    experts_tk: Tensor,
    gates_tk: Tensor,
    activation: Activation,
) -> Tensor:
    count = w_in_egd.shape[0]
    rows_each = experts_tk.numel() / count
    dtype = _compute_dtype(x_td, rows_each)
    grouped = dtype == x_td.dtype and rows_each <= GROUPED_ROWS and _has_grouped_mm(dtype, w_out_edf)
    rows = _sort_by_expert(experts_tk, count, grouped=grouped)
    inputs = x_td.to(dtype), w_in_egd, w_out_edf, gates_tk.to(dtype)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        out_td: Tensor = _CpuExperts.apply(*inputs, rows, activation)  # type: ignore[no-untyped-call]
    else:
        out_td = _forward(*inputs, rows, activation)
    return out_td.to(x_td.dtype)


def _compute_dtype(x_td: Tensor, rows_each: float) -> torch.dtype:
    """Return the dtype of the products: float32 for bfloat16 where that is faster.

    Without bfloat16 instructions it is, but for a single token. rows_each: rows of each expert, on average.
    """
    if x_td.dtype != torch.bfloat16 or bfloat16_is_fast():
        return x_td.dtype
    slow_instructions = "avx512_bf16" in processor_flags()
    few = rows_each <= BFLOAT16_ROWS if slow_instructions else len(x_td) == 1
    return x_td.dtype if few else torch.float32


class _Group(NamedTuple):
    """Rows that go through all operations together.

    rows: a slice of `_Rows`. expert: the one that they belong to, or -1 for all experts. ends_e: for all
    experts, the end of each one's rows, int32.
    """

    rows: slice
    expert: int
    ends_e: Tensor | None = None


class _Rows(NamedTuple):
    """Expert assignments sorted by expert.

    token_n: the token of each row. row_tk: the row of each assignment. unused: experts that are in no group.
    """

    token_n: Tensor
    row_tk: Tensor
    groups: list[_Group]
    unused: list[int]


def _sort_by_expert(experts_tk: Tensor, count: int, *, grouped: bool) -> _Rows:
    """Sort assignments to `count` experts; grouped: in one group.

    numpy sorts 16-bit integers by counting: 24 us for 8,192 assignments, torch takes 240.
    """
    experts_n = experts_tk.flatten().numpy()
    order_n = (experts_n.astype(np.uint16) if count <= 2**16 else experts_n).argsort(kind="stable")
    counts = np.bincount(experts_n, minlength=count).tolist()
    if len(counts) > count:
        raise IndexError(f"expert {len(counts) - 1} was assigned, and there are {count}")
    row_n = np.empty_like(order_n)
    row_n[order_n] = np.arange(len(order_n))
    ends = [0, *accumulate(counts)]
    if grouped:
        groups = [_Group(slice(0, ends[-1]), -1, torch.tensor(ends[1:], dtype=torch.int32))]
    else:
        groups = [_Group(slice(*ends[e : e + 2]), e) for e in range(count) if counts[e]]
    return _Rows(
        torch.from_numpy(order_n // experts_tk.shape[1]),
        torch.from_numpy(row_n).view(experts_tk.shape),
        groups,
        [] if grouped else [e for e in range(count) if not counts[e]],
    )


def _forward(
    x_td: Tensor,
    w_in_egd: Tensor,
    w_out_edf: Tensor,
    gates_tk: Tensor,
    rows: _Rows,
    activation: Activation,
    saved: list[Tensor] | None = None,
) -> Tensor:
    """Compute `feed_forward_experts`; append what the backward pass needs to `saved`.

    Weights are in the dtype of `x_td` or in a narrower one, and are then converted one expert at a time.
    """
    expert_out_nd = x_td.new_empty(len(rows.token_n), x_td.shape[1])
    for group in rows.groups:
        x_nd = x_td.index_select(0, rows.token_n[group.rows])
        gate_nf, up_nf = _gate_and_up(x_nd, w_in_egd, group)
        if saved is None:
            active_nf = _activate_in_place(gate_nf, activation)
            hidden_nf = active_nf.mul_(up_nf)
        else:
            active_nf = activate(gate_nf, activation)
            hidden_nf = active_nf * up_nf
            saved += x_nd, gate_nf, up_nf, active_nf
        _times(hidden_nf, w_out_edf.transpose(1, 2), group, out=expert_out_nd[group.rows])
        # Free them first, so that the next group's tensors take their places in the caches.
        del x_nd, gate_nf, up_nf, active_nf, hidden_nf
    # One pass over memory for the weighted sum.
    return F.embedding_bag(rows.row_tk, expert_out_nd, mode="sum", per_sample_weights=gates_tk)


class _CpuExperts(torch.autograd.Function):
    """`_forward` with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x_td: Tensor,
        w_in_egd: Tensor,
        w_out_edf: Tensor,
        gates_tk: Tensor,
        rows: _Rows,
        activation: Activation,
    ) -> Tensor:
        saved: list[Tensor] = []
        out_td = _forward(x_td, w_in_egd, w_out_edf, gates_tk, rows, activation, saved)
        ctx.rows, ctx.activation = rows, activation
        ctx.save_for_backward(w_in_egd, w_out_edf, gates_tk, *saved)
        return out_td

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_td: Tensor) -> tuple[Tensor | None, ...]:
        w_in_egd, w_out_edf, gates_tk, *saved = ctx.saved_tensors
        rows: _Rows = ctx.rows
        needs_x, needs_w_in, needs_w_out, needs_gates, *_ = ctx.needs_input_grad
        gates_n1 = gates_tk.new_empty(gates_tk.numel(), 1)
        gates_n1[rows.row_tk.flatten(), 0] = gates_tk.flatten()
        grad_gates_n = torch.empty_like(gates_n1[:, 0]) if needs_gates else None
        grad_x_nd = grad_td.new_empty(len(gates_n1), grad_td.shape[1]) if needs_x else None
        grad_w_in = _empty_gradient(w_in_egd, rows) if needs_w_in else None
        grad_w_out = _empty_gradient(w_out_edf, rows) if needs_w_out else None

        for group, (x_nd, gate_nf, up_nf, active_nf) in zip(rows.groups, _fours(saved), strict=True):
            grad_nd = grad_td.index_select(0, rows.token_n[group.rows])
            # Gradients without the gate, because the gate's own gradient needs them so.
            grad_hidden_nf = _times(grad_nd, w_out_edf, group)
            grad_active_nf = grad_hidden_nf * up_nf
            if grad_gates_n is not None:
                torch.sum(grad_active_nf * active_nf, dim=1, out=grad_gates_n[group.rows])
            # From here on with the gate.
            grad_active_nf.mul_(gates_n1[group.rows])
            active_nf = active_nf * gates_n1[group.rows]
            if grad_w_out is not None:
                grad_w_out = _weight_gradient(grad_nd, active_nf * up_nf, group, grad_w_out)
            if grad_x_nd is None and grad_w_in is None:
                continue
            grad_gate_up_ng = x_nd.new_empty(len(x_nd), w_in_egd.shape[1])
            grad_gate_nf, grad_up_nf = grad_gate_up_ng.chunk(2, dim=1)
            _activation_gradient(grad_active_nf, gate_nf, ctx.activation, out=grad_gate_nf)
            torch.mul(grad_hidden_nf, active_nf, out=grad_up_nf)
            if grad_w_in is not None:
                grad_w_in = _weight_gradient(grad_gate_up_ng, x_nd, group, grad_w_in)
            if grad_x_nd is not None:
                _times(grad_gate_up_ng, w_in_egd, group, out=grad_x_nd[group.rows])
            # As in the forward pass.
            del grad_nd, grad_hidden_nf, grad_active_nf, active_nf, grad_gate_up_ng, grad_gate_nf, grad_up_nf

        grad_x_td = None if grad_x_nd is None else F.embedding_bag(rows.row_tk, grad_x_nd, mode="sum")
        grad_gates_tk = None if grad_gates_n is None else grad_gates_n[rows.row_tk]
        return grad_x_td, grad_w_in, grad_w_out, grad_gates_tk, None, None


def _activate_in_place(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to `x` itself."""
    if activation == "silu":
        return F.silu(x, inplace=True)
    if activation == "relu":
        return F.relu(x, inplace=True)
    out: Tensor = torch.ops.aten.gelu_(x, approximate=_APPROXIMATION[activation])
    return out


def _activation_gradient(grad: Tensor, x: Tensor, activation: Activation, *, out: Tensor) -> None:
    """Write the gradient of an activation's input `x` to `out`."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            grad, x, approximate=_APPROXIMATION[activation], grad_input=out
        )


_APPROXIMATION = {"gelu_tanh": "tanh", "gelu": "none"}


def _fours(saved: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(saved[::4], saved[1::4], saved[2::4], saved[3::4], strict=True)


def _times(x_nx: Tensor, w_exy: Tensor, group: _Group, *, out: Tensor | None = None) -> Tensor:
    """Multiply a group's rows by the matrices of their experts; `[n, y]`."""
    if group.expert >= 0:
        return torch.mm(x_nx, w_exy[group.expert].to(x_nx.dtype), out=out)
    result_ny = F.grouped_mm(x_nx, w_exy, offs=group.ends_e)
    return result_ny if out is None else out.copy_(result_ny)


def _gate_and_up(x_nd: Tensor, w_in_egd: Tensor, group: _Group) -> tuple[Tensor, ...]:
    """Multiply a group's rows by `w_gate` and `w_up`; `[n, f]` each.

    With many rows, two matmuls cost less than elementwise operations on the halves of one result.
    """
    if group.expert < 0:
        return _times(x_nd, w_in_egd.transpose(1, 2), group).chunk(2, dim=1)
    return tuple(x_nd @ w_fd.t() for w_fd in w_in_egd[group.expert].to(x_nd.dtype).chunk(2))


def _empty_gradient(w: Tensor, rows: _Rows) -> Tensor:
    """Allocate the gradient of `w`; experts without rows get 0, the others are written later."""
    grad_w = torch.empty_like(w)
    for expert in rows.unused:
        grad_w[expert].zero_()
    return grad_w


def _weight_gradient(grad_ny: Tensor, x_nx: Tensor, group: _Group, grad_w_eyx: Tensor) -> Tensor:
    """Return the weights' gradient with a group's part: output gradients, transposed, times inputs."""
    if group.expert < 0:
        return F.grouped_mm(grad_ny.t(), x_nx, offs=group.ends_e)
    if grad_w_eyx.dtype == grad_ny.dtype:
        torch.mm(grad_ny.t(), x_nx, out=grad_w_eyx[group.expert])
    else:
        grad_w_eyx[group.expert] = grad_ny.t() @ x_nx
    return grad_w_eyx
