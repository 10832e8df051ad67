"""Norms and activations as lists of operations on fixed tensors, for `prepacked_decoder`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.generate.cpu.one_row import Operation
from koine.model.config import Activation
from koine.model.feed_forward import activate as activation_of
from koine.model.norm import HeadNorm, Norm


def normalise(norm: Norm, x: Tensor, out: Tensor, single: Tensor) -> list[Operation]:
    """Normalise `x` `[rows, size]` into `out`.

    single: float32 scratch `[rows, size]`, for an `x` in bfloat16.
    """
    if norm.kind == "layer_norm":
        gain = norm.gain.to(x.dtype)
        bias = None if norm.bias is None else norm.bias.to(x.dtype)
        return [lambda: out.copy_(torch.layer_norm(x, gain.shape, gain, bias, norm.eps))]
    gain = norm.gain.float()
    scaled = out if x.dtype == torch.float32 else single
    scale, operations = _inverse_rms(x, norm.eps)
    return [*operations, partial(torch.mul, x, scale, out=scaled), partial(torch.mul, scaled, gain, out=out)]


def normalise_heads(q_norm: HeadNorm, k_norm: HeadNorm, heads_nhd: Tensor) -> list[Operation]:
    """Normalise queries and keys `[rows, heads + kv_heads, head_dim]` (float32) in place."""
    size = heads_nhd.shape[-1]
    gains = [norm.gain.float().expand(norm.heads, size) for norm in (q_norm, k_norm)]
    if q_norm.kind == "full":
        parts = [part.flatten(1) for part in heads_nhd.split_with_sizes((q_norm.heads, k_norm.heads), dim=1)]
    else:
        parts, gains = [heads_nhd], [torch.cat(gains)]
    operations: list[Operation] = []
    for part, gain in zip(parts, gains, strict=True):
        if q_norm.norm == "layer_norm":
            operations.append(_centred(part, q_norm.eps))
        else:
            scale, inverse = _inverse_rms(part, q_norm.eps)
            operations += [*inverse, partial(part.mul_, scale)]
        operations.append(partial(part.mul_, gain.reshape(part.shape[1:])))
    return operations


def activate(gate: Tensor, up: Tensor, out: Tensor, activation: Activation) -> Operation:
    """Write the hidden units of a feed-forward into `out`; `gate` is `[rows, 0]` in a plain one."""
    if not gate.shape[-1]:
        return lambda: out.copy_(activation_of(up, activation))
    if activation == "silu":
        return lambda: torch.mul(F.silu(gate, inplace=True), up, out=out)
    return lambda: torch.mul(activation_of(gate, activation), up, out=out)


def _inverse_rms(x: Tensor, eps: float) -> tuple[Tensor, list[Operation]]:
    """Return a tensor `[..., 1]` and the operations that write `1 / rms(x)` into it."""
    scale, eps_tensor = torch.empty(*x.shape[:-1], 1), torch.tensor(eps)
    return scale, [
        partial(torch.linalg.vector_norm, x, dim=-1, keepdim=True, dtype=torch.float32, out=scale),
        partial(torch.addcmul, eps_tensor, scale, scale, value=1 / x.shape[-1], out=scale),
        scale.rsqrt_,
    ]


def _centred(x: Tensor, eps: float) -> Operation:
    return lambda: x.copy_(F.layer_norm(x, x.shape[-1:], None, None, eps))
