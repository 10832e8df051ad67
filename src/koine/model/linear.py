"""Linear layers whose float32 matmuls run in oneDNN where torch's own BLAS, MKL, is slower.

On AMD, MKL multiplies `[m, k]` by a transposed `[n, k]` at 36 to 194 GFLOP/s, oneDNN at 188 to 212; the
weight's gradient is as fast in MKL (docs/explanation/log.md). oneDNN takes only weights that are contiguous,
or the transpose of such: for others it has a reference loop 1,000 times slower.

Shape suffixes: m rows, i in_features, o out_features.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from koine.hardware import is_intel

MIN_ROWS = 64
"""Least rows of `x` for oneDNN: fewer do not repay the kernel that it generates for each new shape."""


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in_features]` to `[..., out_features]`."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`; arguments as in `torch.nn.functional.linear`."""
    if not _onednn_is_faster(x, weight):
        return F.linear(x, weight, bias)
    needed = (x, weight) if bias is None else (x, weight, bias)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needed)):
        return _onednn(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T`, `[rows, n]`, for `a` `[rows, k]` and `b` `[n, k]`, without gradients."""
    return _onednn(a, b, None) if _onednn_is_faster(a, b) else torch.mm(a, b.t())


def _onednn_is_faster(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and x.numel() >= MIN_ROWS * x.shape[-1]
        and weight.is_contiguous()
        and _prefers_onednn()
    )


@functools.cache
def _prefers_onednn() -> bool:
    """Return whether this build of torch calls MKL on a processor that is not Intel's, and has oneDNN."""
    has_onednn = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return bool(has_onednn and torch._C.has_mkl and not is_intel())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor, bias_o: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_oi)
        return _onednn(x, weight_oi, bias_o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_oi = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_mo = grad.reshape(-1, grad.shape[-1])
        return (
            _onednn(grad, weight_oi.t(), None) if needs_x else None,
            torch.mm(grad_mo.t(), x.reshape(-1, x.shape[-1])) if needs_weight else None,
            grad_mo.sum(dim=0) if needs_bias else None,
        )
