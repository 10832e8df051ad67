"""Interleaved rotary position embedding (Cohere's layout: the pair (2i, 2i+1) shares one angle)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, float32, broadcastable to `[..., head_dim / 2]`.

    turns: the same as complex numbers, where nothing is to be learnt: a rotation is then one multiplication.
    """

    cos: Tensor
    sin: Tensor
    cis: Tensor | None = None

    def view_as_heads(self) -> Rotation:
        """From `[batch, time, head_dim / 2]` to `[batch, time, 1, head_dim / 2]`."""
        cis = None if self.cis is None else self.cis.unsqueeze(-2)
        return Rotation(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2), cis)

    def scaled(self, factor: float) -> Rotation:
        """A rotation that multiplies by `factor` too: the scale of the scores rides on the tables."""
        cis = None if self.cis is None else self.cis * factor
        return Rotation(self.cos * factor, self.sin * factor, cis)


@functools.lru_cache(maxsize=16)
def _frequencies(head_dim: int, theta: float, device: torch.device) -> Tensor:
    # An ordinary tensor even where it is first asked for in inference mode: training asks for the same one.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        return theta**-exponents


def rotation(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """Angles `position * theta ** (-2i / head_dim)`; `positions` `[...]` gives tables `[..., head_dim / 2]`."""
    angles = positions.to(torch.float32).unsqueeze(-1) * _frequencies(head_dim, theta, positions.device)
    cos, sin = angles.cos(), angles.sin()
    return Rotation(cos, sin, None if torch.is_grad_enabled() else torch.complex(cos, sin))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(compute)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    out = torch.empty((*even.shape, 2), dtype=compute, device=x.device)
    torch.mul(even, cos, out=out[..., 0]).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=out[..., 1]).addcmul_(even, sin)
    return out.flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    # Written out because the backward pass is the rotation by the opposite angle: nothing but the tables is saved.
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def apply_rotary_in_place(x: Tensor, angles: Rotation) -> Tensor:
    """`apply_rotary` where nothing is to be learnt and `x` `[..., head_dim]` is nobody else's: in float32 it is changed and given back."""
    if angles.cis is None or x.dtype != torch.float32:
        return apply_rotary(x, angles)
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(angles.cis)
    return x


def apply_rotary(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate `x` `[..., head_dim]`; computed in float32 and returned in the dtype of `x`, as Cohere does."""
    if torch.compiler.is_compiling():
        # The compiler fuses the plain expression, and cannot follow writes into slices of an empty tensor.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        even, odd = wide[..., 0::2], wide[..., 1::2]
        turned = (even * angles.cos - odd * angles.sin, odd * angles.cos + even * angles.sin)
        return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)
    if angles.cis is not None:
        # Adjacent pairs are complex numbers: one operation in place of six.
        single = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        pairs = torch.view_as_complex(single.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles.cis).flatten(-2).to(x.dtype)
    result = _Rotate.apply(x, angles.cos, angles.sin)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
