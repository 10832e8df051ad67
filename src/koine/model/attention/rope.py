"""Rotary position embedding (RoPE, arXiv 2104.09864), interleaved: the pair (2i, 2i+1) shares one angle.

Most classes of `transformers` rotate the pair (i, i + head_dim / 2). Their weights are permuted when they are
read and written (`koine.model.formats.rotary_layout`), which changes no attention score.
The frequencies and their scaling: `koine.model.attention.rope_frequencies`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from koine.model.attention.rope_frequencies import (
    Rope,
    attention_factor,
    dynamic_frequencies,
    frequencies_of,
    sequence_lengths,
)


class Rotation(NamedTuple):
    """Cosines and sines of the angles of some positions, float32, broadcastable to `[..., head_dim / 2]`.

    cis: the same as complex numbers, `cos + i sin`, without gradients; the rotation is then one product.
    """

    cos: Tensor
    sin: Tensor
    cis: Tensor | None = None

    def view_as_heads(self) -> Rotation:
        """Return a view of `[batch, time, head_dim / 2]` tables as `[batch, time, 1, head_dim / 2]`."""
        cis = None if self.cis is None else self.cis.unsqueeze(-2)
        return Rotation(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2), cis)

    def scaled(self, factor: float) -> Rotation:
        """Return a rotation that also multiplies by `factor`, for the scale of the attention scores."""
        cis = None if self.cis is None else self.cis * factor
        return Rotation(self.cos * factor, self.sin * factor, cis)


def rotation(positions: Tensor, rope: Rope, lengths: Tensor | None = None) -> Rotation:
    """Compute the tables of the angles `position * frequency`.

    Args:
        positions: `[batch, time]`, for tables `[batch, time, head_dim / 2]`.
        rope: base, scaling and sizes.
        lengths: `[batch, time]`, of the sequence that each position belongs to, for dynamic scaling; None:
            see `sequence_lengths`.
    """
    if rope.scaling is not None and rope.scaling.kind == "dynamic":
        lengths = sequence_lengths(positions) if lengths is None else lengths
        frequencies = dynamic_frequencies(lengths, rope)
    else:
        frequencies = frequencies_of(rope, positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    factor = attention_factor(rope.scaling)
    if factor != 1.0:
        rotated = rope.rotary_dim // 2
        cos[..., :rotated] *= factor
        sin[..., :rotated] *= factor
    return Rotation(cos, sin, None if torch.is_grad_enabled() else torch.complex(cos, sin))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    upcast = x.to(compute)
    even, odd = upcast[..., 0::2], upcast[..., 1::2]
    out = torch.empty((*even.shape, 2), dtype=compute, device=x.device)
    torch.mul(even, cos, out=out[..., 0]).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=out[..., 1]).addcmul_(even, sin)
    return out.flatten(-2).to(x.dtype)


class _Rotate(torch.autograd.Function):
    # The backward pass is the rotation by the opposite angle, so only the tables are saved for it.
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def apply_rotary_in_place(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate `x` `[..., head_dim]`, in place where it is float32 and no gradient is needed.

    The caller must own `x` and use only the returned tensor.
    """
    if angles.cis is None or x.dtype != torch.float32:
        return apply_rotary(x, angles)
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(angles.cis)
    return x


def apply_rotary(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate `x` `[..., head_dim]`, computed in float32 and returned in the dtype of `x`, as Cohere does."""
    if torch.compiler.is_compiling():
        # The compiler fuses the plain expression, and cannot follow writes into slices of an empty tensor.
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        even, odd = upcast[..., 0::2], upcast[..., 1::2]
        rotated = (even * angles.cos - odd * angles.sin, odd * angles.cos + even * angles.sin)
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)
    if angles.cis is not None:
        # Adjacent pairs are complex numbers: one operation in place of six.
        single = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        pairs = torch.view_as_complex(single.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * angles.cis).flatten(-2).to(x.dtype)
    result = _Rotate.apply(x, angles.cos, angles.sin)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result
