"""The norms of the decoder: LayerNorm and RMSNorm (arXiv 1910.07467) of hidden states, and of heads.

They are computed in float32 for any input dtype. Shape suffixes: b batch, t time, h heads, d head_dim,
c copies (attention experts).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.model.config import ModelConfig, QKNorm


class _RMSNorm(torch.autograd.Function):
    # torch composes rms_norm of many operations on CPU; these are fewer passes over memory, and save `x` and
    # one number a row (docs/explanation/log.md).
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (x * scale).mul_(weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        product = grad * x
        if ctx.needs_input_grad[1]:
            # A product of matrices sums over the rows.
            rows = product.view(-1, x.shape[-1])
            grad_weight = (scale.view(1, -1) @ rows).view_as(weight)
        if ctx.needs_input_grad[0]:
            along = (product @ weight).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
            grad_x = (grad * weight).mul_(scale).addcmul_(x, along)
        return grad_x, grad_weight, None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return `1 / sqrt(mean(x ** 2) + eps)` over the last dimension, which is kept with size 1."""
    # One pass over `x`, and no product in memory.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight` over the last dimension, in the dtype of `x`, computed in float32."""
    if x.is_cuda or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    upcast = torch.promote_types(x.dtype, torch.float32)
    result: Tensor = _RMSNorm.apply(x.to(upcast), weight.to(upcast), eps)  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


class Norm(nn.Module):
    """LayerNorm or RMSNorm of `[..., size]`, as the configuration says.

    weight, bias: `[size]`; there is a bias with `norm_bias` only.
    """

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm_bias else None
        self.kind, self.eps, self.unit_offset = config.norm, config.norm_eps, config.norm_unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it a norm without a gain."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def gain(self) -> Tensor:
        """What the normed vector is multiplied with, `[size]`."""
        return self.weight + 1 if self.unit_offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` `[..., size]`."""
        if self.kind == "rms_norm":
            return rms_norm(x, self.gain, self.eps)
        # The fused kernel keeps its statistics in float32 for any input dtype.
        gain = self.gain.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return torch.layer_norm(x, gain.shape, gain, bias, self.eps)


class HeadNorm(nn.Module):
    """Norm of queries or keys before the rotation; see `QKNorm`.

    weight: `head`: `[head_dim]`, or `[copies, head_dim]` of several attention experts. `heads` and `full`:
    `[heads, head_dim]`. `grouped` says how the heads of the experts lie: those of one expert side by side,
    or those of all experts side by side under each key head.
    """

    def __init__(
        self, kind: QKNorm, heads: int, copies: int, config: ModelConfig, *, grouped: bool, key_heads: int
    ) -> None:
        super().__init__()
        self.kind, self.heads, self.copies, self.grouped = kind, heads, copies, grouped
        self.key_heads = key_heads
        self.norm, self.eps, self.unit_offset = config.norm, config.norm_eps, config.norm_unit_offset
        size = config.head_dim
        if kind == "head":
            shape: tuple[int, ...] = (size,) if copies == 1 else (copies, size)
        else:
            shape = (heads, size)
        self.weight = nn.Parameter(torch.ones(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make it a norm without a gain."""
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    @property
    def gain(self) -> Tensor:
        """What the normed heads are multiplied with, `[head_dim]` or `[heads, head_dim]`."""
        gain = self.weight + 1 if self.unit_offset else self.weight
        if self.kind != "head" or self.copies == 1:
            return gain
        each = self.heads // self.copies
        if self.grouped:
            return gain.repeat_interleave(each, dim=0)
        # Under each key head: all heads of the first expert, then those of the second.
        groups = each // self.key_heads
        return gain.repeat_interleave(groups, dim=0).repeat(self.key_heads, 1)

    def forward(self, x_bthd: Tensor) -> Tensor:
        """Normalise `[batch, time, heads, head_dim]`."""
        upcast = x_bthd.to(torch.promote_types(x_bthd.dtype, torch.float32))
        if self.kind == "full":
            normed = self._over_all_heads(upcast)
        elif self.norm == "layer_norm":
            normed = F.layer_norm(upcast, upcast.shape[-1:], None, None, self.eps)
        elif self.gain.dim() == 1:
            return rms_norm(upcast, self.gain, self.eps).to(x_bthd.dtype)
        else:
            # `inverse_rms` works in place, and is for code with a backward pass of its own.
            normed = upcast * (upcast.square().mean(dim=-1, keepdim=True) + self.eps).rsqrt()
        return (normed * self.gain).to(x_bthd.dtype)

    def _over_all_heads(self, x_bthd: Tensor) -> Tensor:
        """Normalise over the heads of each attention expert together."""
        if self.grouped or self.copies == 1:
            apart = torch.unflatten(x_bthd, 2, (1, self.copies, -1))
        else:
            apart = torch.unflatten(x_bthd, 2, (self.key_heads, self.copies, -1))
        dims = (2, 4, 5)
        if self.norm == "layer_norm":
            apart = apart - apart.mean(dim=dims, keepdim=True)
        scale = (apart.square().mean(dim=dims, keepdim=True) + self.eps).rsqrt()
        normed: Tensor = (apart * scale).reshape(x_bthd.shape)
        return normed
