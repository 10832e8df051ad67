"""SwiGLU experts in C++ of ours (`compiled_experts.cpp`): for few tokens whole, each matrix read, and its gradient written, once; for many what is between
their products."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koine.model.moe.cpp_extension import library

MOST_ROWS = 64
"""Of one group in `forward` and `backward`, as in the source."""

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
    halves = None
    if keep:
        halves = torch.empty(_width(groups) * into.shape[1], dtype=torch.float32, device=x.device)
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
    _function("swiglu", units.dtype)(*map(_pointer, (halves, units)), *units.shape, torch.get_num_threads())


def swiglu_backward(grad: Tensor, halves: Tensor, grad_halves: Tensor, units: Tensor) -> None:
    """Writes the gradient of both halves to `grad_halves` and the units again to `units`. grad: `[rows, intermediate]`; the rest as in `swiglu`."""
    pointers = map(_pointer, (grad, halves, grad_halves, units))
    _function("swiglu_backward", units.dtype)(*pointers, *units.shape, torch.get_num_threads())


def gather(tokens: Tensor, numbers: Tensor, weights: Tensor, to: Tensor) -> None:
    """Writes the tokens of these numbers, each times its weight. tokens: `[tokens, hidden]`; numbers: `[rows]` int64; weights: `[rows]`; to: `[rows, hidden]`."""
    pointers = map(_pointer, (tokens, numbers, weights, to))
    _function("gather", to.dtype)(*pointers, *to.shape, torch.get_num_threads())


def _call(name: str, out: Tensor, tokens: Tensor, groups: np.ndarray, *tensors: Tensor | None) -> None:
    assert groups.dtype == np.int64
    assert groups.flags.c_contiguous
    hidden, intermediate = out.shape[1:]
    problem = _Problem(
        groups.ctypes.data, _pointer(tokens), len(groups), hidden, intermediate, torch.get_num_threads()
    )
    _function(name, out.dtype)(ctypes.addressof(problem), *map(_pointer, tensors))


ARGUMENTS = {
    "forward": [ctypes.c_void_p] * 6,
    "backward": [ctypes.c_void_p] * 10,
    "swiglu": [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int],
    "swiglu_backward": [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int],
    "gather": [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_int],
}


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    compiled = library(SOURCE)
    assert compiled is not None
    function = getattr(compiled, f"{name}_{NAMES[dtype]}")
    function.argtypes, function.restype = ARGUMENTS[name], None
    return function


def _pointer(one: Tensor | None) -> int | None:
    assert one is None or one.is_contiguous()
    return None if one is None else one.data_ptr()
