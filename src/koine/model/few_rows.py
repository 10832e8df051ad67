"""SwiGLU experts for few tokens in C++ of ours (`few_rows.cpp`): each expert's matrices are read, and their gradients written, once."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from koine.model.compiled import library

MOST_ROWS = 32
"""Of one expert."""

SOURCE = Path(__file__).with_name("few_rows.cpp")

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
    halves = torch.empty(_width(groups) * into.shape[1]) if keep else None
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
    """Columns of all groups: 16 of them, or 32, for each."""
    return int(np.where(groups[:, 2] - groups[:, 1] > 16, 32, 16).sum())


def _call(name: str, out: Tensor, tokens: Tensor, groups: np.ndarray, *tensors: Tensor | None) -> None:
    compiled = library(SOURCE)
    assert compiled is not None
    assert all(one is None or one.is_contiguous() for one in tensors)
    assert groups.dtype == np.int64 and groups.flags.c_contiguous and tokens.is_contiguous()
    problem = _Problem(
        groups.ctypes.data, tokens.data_ptr(), len(groups), out.shape[1], out.shape[2], torch.get_num_threads()
    )
    getattr(compiled, f"{name}_{NAMES[out.dtype]}")(
        ctypes.byref(problem),
        *(ctypes.c_void_p(None if one is None else one.data_ptr()) for one in tensors),
    )
