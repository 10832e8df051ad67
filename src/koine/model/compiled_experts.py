"""SwiGLU experts in C++ of ours (`compiled_experts.cpp`): for few tokens whole, each matrix read, and its gradient written, once; for many what is between
their products."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koine.model.compiled import library

MOST_ROWS = 64
"""Of one expert in `forward` and `backward`."""

SOURCE = Path(__file__).with_suffix(".cpp")

NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class _Problem(ctypes.Structure):
    """The struct of the same name in the source."""

    _fields_ = (
        ("groups", ctypes.c_void_p),
        ("tokens", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("threads", ctypes.c_int),
    )


def compiled_for(x: Tensor) -> bool:
    """Whether `forward` and `backward` take tokens like these: on CPU, in float32 or bfloat16, on a machine that could compile them."""
    return x.device.type == "cpu" and x.dtype in NAMES and library(SOURCE) is not None


def forward(
    x: Tensor, into: Tensor, out: Tensor, tokens: Tensor, groups: np.ndarray, said: Tensor, *, keep: bool
) -> Tensor | None:
    """Writes `out_e (silu(gate_e x) * (up_e x))` of each group's rows to `said`.

    All in one dtype and contiguous; sums are float32.

    Args:
        x: `[tokens, hidden]`.
        into: `[experts, 2 * intermediate, hidden]`; out: `[experts, hidden, intermediate]`.
        tokens: `[rows]` int64, the token of each row.
        groups: `[groups, 3]` int64: expert, first and last row (exclusive), 1 to `MOST_ROWS` of them.
        said: `[rows, hidden]`.
        keep: whether `backward` will follow.

    Returns:
        What `backward` needs, where it will follow.
    """
    size = _width(groups) * into.shape[1]
    halves = torch.empty(size, dtype=torch.float32, device=x.device) if keep else None
    _call("forward", out, tokens, groups, x, into, out, said, halves)
    return halves


def backward(
    grad: Tensor,
    weights: Tensor,
    x: Tensor,
    into: Tensor,
    out: Tensor,
    tokens: Tensor,
    groups: np.ndarray,
    halves: Tensor,
    found: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Writes the gradients of `forward` to `found`: of each row's token `[rows, hidden]`, of `into` and of `out`, of the groups' experts; None where one is
    not asked for.

    grad: `[tokens, hidden]`; weights: `[rows]` float32, of each row in its token's answer; halves: what `forward` returned; the rest as there.
    """
    _call("backward", out, tokens, groups, grad, weights.float(), x, into, out, halves, *found)


def _width(groups: np.ndarray) -> int:
    """Columns of all groups: each in full sixteens."""
    return int(((groups[:, 1] - groups[:, 2]) // 16 * -16).sum())


def swiglu(halves: Tensor, units: Tensor) -> None:
    """Writes `silu(gate) * up` to `units`. halves: `[rows, 2 * intermediate]`, the gate's, then up's; units: `[rows, intermediate]`. All here contiguous."""
    _function("swiglu", units)(_pointer(halves), _pointer(units), *_sizes(units))


def swiglu_backward(grad: Tensor, halves: Tensor, grad_halves: Tensor, units: Tensor) -> None:
    """Writes the gradient of both halves to `grad_halves` and the units again to `units`. grad: `[rows, intermediate]`; the rest as in `swiglu`."""
    pointers = (_pointer(one) for one in (grad, halves, grad_halves, units))
    _function("swiglu_backward", units)(*pointers, *_sizes(units))


def gather(tokens: Tensor, numbers: Tensor, weights: Tensor, to: Tensor) -> None:
    """Writes the tokens of these numbers, each times its weight. tokens: `[tokens, hidden]`; numbers: `[rows]` int64; weights: `[rows]`; to: `[rows, hidden]`."""
    pointers = (_pointer(one) for one in (tokens, numbers, weights, to))
    _function("gather", to)(*pointers, *_sizes(to))


def _call(name: str, out: Tensor, tokens: Tensor, groups: np.ndarray, *tensors: Tensor | None) -> None:
    assert groups.dtype == np.int64
    assert groups.flags.c_contiguous
    assert tokens.is_contiguous()
    problem = _Problem(
        groups.ctypes.data,
        tokens.data_ptr(),
        len(groups),
        out.shape[1],
        out.shape[2],
        torch.get_num_threads(),
    )
    _function(name, out)(ctypes.byref(problem), *map(_pointer, tensors))


def _function(name: str, like: Tensor) -> Any:
    compiled = library(SOURCE)
    assert compiled is not None
    return getattr(compiled, f"{name}_{NAMES[like.dtype]}")


def _pointer(one: Tensor | None) -> ctypes.c_void_p:
    assert one is None or one.is_contiguous()
    return ctypes.c_void_p(None if one is None else one.data_ptr())


def _sizes(rows: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int]:
    return ctypes.c_int64(rows.shape[0]), ctypes.c_int64(rows.shape[1]), ctypes.c_int(torch.get_num_threads())
