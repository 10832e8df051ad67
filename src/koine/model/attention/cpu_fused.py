"""Full causal attention on CPU for training, through the fused kernel of SDPA.

With GQA the kernel's backward pass gives each thread whole key heads: three key heads take two threads as
long as four. Here it gets one key head for each query head, and the gradients of a group are added up. The
forward pass divides its work evenly and reads the keys as they are.

Shape suffixes: b batch, h query heads, t time, k kv_heads, d head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_bhtd: Tensor, k_bktd: Tensor, v_bktd: Tensor) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_bhtd: Tensor
        out_bhtd, lse_bht = fused(q_bhtd, k_bktd, v_bktd, 0.0, True, scale=1.0)
        ctx.save_for_backward(q_bhtd, k_bktd, v_bktd, out_bhtd, lse_bht)
        return out_bhtd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_bhtd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_bhtd, k_bktd, v_bktd, out_bhtd, lse_bht = ctx.saved_tensors
        kv_heads = k_bktd.shape[1]
        groups = q_bhtd.shape[1] // kv_heads
        k_bhtd, v_bhtd = (one.repeat_interleave(groups, dim=1) for one in (k_bktd, v_bktd))
        grad_q, *grads_kv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_bhtd, q_bhtd, k_bhtd, v_bhtd, out_bhtd, lse_bht, 0.0, True, scale=1.0
        )
        # Sums over the query heads of a key head are accumulated in float32 by torch.
        grad_k, grad_v = (grad.unflatten(1, (kv_heads, groups)).sum(dim=2) for grad in grads_kv)
        return grad_q, grad_k, grad_v


def threads_idle(k: Tensor, groups: int) -> bool:
    """Return whether threads wait for others where each takes whole key heads of `k` `[batch, kv_heads, ...]`.

    groups: query heads of a key head. Compiled code calls SDPA itself.
    """
    key_heads = k.shape[0] * k.shape[1]
    return groups > 1 and key_heads % torch.get_num_threads() != 0 and not torch.compiler.is_compiling()


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of every position to itself and all earlier ones.

    Args:
        q: `[batch, heads, time, head_dim]`, scaled by `head_dim ** -0.5`.
        k, v: `[batch, kv_heads, time, head_dim]`.

    Returns:
        `[batch, heads, time, head_dim]`.
    """
    result: Tensor = _FusedAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return result
