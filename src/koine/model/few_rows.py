"""Products of few rows with the matrices of many experts, in C++ of ours (`few_rows.cpp`): each matrix is read, or its gradient written, once."""

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


def compiled_for(x: Tensor) -> bool:
    """Whether the products can be taken for tensors like this one: on CPU, in float32 or bfloat16, on a machine that could compile them."""
    return x.device.type == "cpu" and x.dtype in NAMES and library(SOURCE) is not None


def times_transposed(rows: Tensor, matrices: Tensor, groups: np.ndarray, out: Tensor) -> None:
    """Each group's rows times its expert's transposed matrix.

    rows: `[rows, in]`; matrices: `[experts, result, in]`; groups: `[groups, 3]` int64, expert, first and last row (exclusive), 1 to `MOST_ROWS` each; out:
    `[rows, result]`. All contiguous and of one dtype; sums are float32.
    """
    _call("times_transposed", rows, matrices, out, groups, matrices.shape[1:])


def times(rows: Tensor, matrices: Tensor, groups: np.ndarray, out: Tensor) -> None:
    """Each group's rows times its expert's matrix. rows: `[rows, in]`; matrices: `[experts, in, result]`; out: `[rows, result]`; groups as above."""
    _call("times", rows, matrices, out, groups, matrices.shape[1:])


def transposed_times(left: Tensor, right: Tensor, groups: np.ndarray, out: Tensor) -> None:
    """Each group's rows on the left, transposed, times those on the right. left: `[rows, result]`; right: `[rows, in]`; out: `[experts, result, in]`, of
    which only the groups' experts are written; groups as above."""
    _call("transposed_times", left, right, out, groups, out.shape[1:])


def _call(
    name: str, first: Tensor, second: Tensor, out: Tensor, groups: np.ndarray, shape: torch.Size
) -> None:
    compiled = library(SOURCE)
    assert compiled is not None
    assert first.is_contiguous() and second.is_contiguous() and out.is_contiguous()
    assert first.dtype == second.dtype == out.dtype
    assert groups.dtype == np.int64 and groups.flags.c_contiguous
    getattr(compiled, f"{name}_{NAMES[first.dtype]}")(
        *(ctypes.c_void_p(one.data_ptr()) for one in (first, second, out)),
        ctypes.c_void_p(groups.ctypes.data),
        *(ctypes.c_int64(size) for size in (len(groups), *shape)),
        ctypes.c_int(torch.get_num_threads()),
    )
