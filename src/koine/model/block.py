"""The decoder's block: attention and feed-forward in parallel on one LayerNorm, as in Cohere and Cohere2.

Shape suffixes: b batch, t time, k kv_heads, g groups (query heads of one key head), h query heads = k * g,
d head_dim, a = h * d, f intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.model.attention.dispatch import attend
from koine.model.attention.rope import Rotation, apply_rotary, apply_rotary_in_place, rotation
from koine.model.config import LayerSpec, ModelConfig
from koine.model.moe.routers import Routing

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`attention(q, k, v)` with a KV cache, to which it adds k and v.

q is `[batch, time, kv_heads, groups, head_dim]` (scaled), k and v `[batch, time, kv_heads, head_dim]`, the
result `[batch, time, heads * head_dim]`.
"""


class Angles(NamedTuple):
    """RoPE's tables for queries (times the scale of the scores) and keys, `[batch, time, 1, head_dim / 2]`.

    qk: both for q and k concatenated along the heads, `[batch, time, heads + kv_heads, head_dim / 2]`; None
        where gradients are needed.
    """

    q: Rotation
    k: Rotation
    qk: Rotation | None


def rope_angles(positions: Tensor, config: ModelConfig) -> Angles:
    """Compute RoPE's tables for `positions` `[batch, time]`, once a forward pass for all layers."""
    k = rotation(positions, config.head_dim, config.rope_theta).view_as_heads()
    q, qk = k.scaled(config.head_dim**-0.5), None
    if q.cis is not None and k.cis is not None:
        heads = (config.query_heads, config.kv_heads)
        expanded = (cis.expand(-1, -1, count, -1) for cis, count in zip((q.cis, k.cis), heads, strict=True))
        qk = Rotation(k.cos, k.sin, torch.cat(tuple(expanded), dim=2))
    return Angles(q, k, qk)


class LayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, computed in float32 as in `transformers`' Cohere."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))
        self.eps, self._vector = eps, len(shape) == 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x` `[..., *shape]`."""
        if self._vector:
            # The fused kernel keeps its statistics in float32 for any input dtype.
            weight = self.weight.to(x.dtype)
            return torch.layer_norm(x, weight.shape, weight, None, self.eps)
        upcast = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.layer_norm(upcast, x.shape[-1:], None, None, self.eps)
        return (normed * self.weight).to(x.dtype)


class Block(nn.Module):
    """`x + attention(norm(x)) + feed_forward(norm(x))`.

    The five projections of `norm(x)` (q, k, v, gate, up) are one matrix, and the two output projections
    (attention, down) are another: two large matmuls in place of seven.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        sizes = config.projection_sizes
        self._sizes = (sizes[0] + sizes[1], *sizes[2:])
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.in_proj = nn.Linear(config.hidden_size, sum(config.projection_sizes), bias=False)
        self.out_proj = nn.Linear(config.attention_size + config.dense_size, config.hidden_size, bias=False)
        if spec.qk_norm:
            self.q_norm = LayerNorm(config.query_heads, config.head_dim, eps=config.norm_eps)
            self.k_norm = LayerNorm(config.kv_heads, config.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Compute the block.

        Args:
            x: `[batch, time, hidden]`.
            angles: RoPE's tables.
            document_starts: `[batch, time]`, see `koine.model.attention.dispatch.attend`.
            attention: that of a KV cache; None: attention over `x` itself.

        Returns:
            The output, of the shape of `x`, and how the tokens were routed (None without experts).
        """
        attended_bta, hidden_btf = self.branches(self.norm(x), angles, document_starts, attention)
        out: Tensor = self.out_proj(torch.cat((attended_bta, hidden_btf), dim=-1))
        return x + out, None

    def branches(
        self,
        normed: Tensor,
        angles: Angles,
        document_starts: Tensor | None,
        attention: AttentionFn | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the two inputs of the output projection.

        Returns:
            The attention heads `[batch, time, heads * head_dim]`, and the feed-forward's gated hidden units
            `[batch, time, intermediate]`.
        """
        q, k, v, hidden_btf = self.project(normed, angles)
        if attention is None:
            return attend(q, k, v, window=self.spec.window, document_starts=document_starts), hidden_btf
        return attention(q, k, v), hidden_btf

    def project(self, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Project the normalised input `[batch, time, hidden]` for attention and feed-forward.

        Returns:
            q `[batch, time, kv_heads, groups, head_dim]`, rotated and scaled; k and v
            `[batch, time, kv_heads, head_dim]`; the gated hidden units `[batch, time, intermediate]`.
        """
        config = self.config
        batch, time, kv_heads, head_dim = *normed.shape[:2], config.kv_heads, config.head_dim
        qk, v, gate_btf, up_btf = self.in_proj(normed).split_with_sizes(self._sizes, dim=-1)
        qk = qk.view(batch, time, config.query_heads + kv_heads, head_dim)
        v_btkd = v.view(batch, time, kv_heads, head_dim)
        rotate_together = self.spec.rope and not self.spec.qk_norm and angles.qk is not None
        if rotate_together:
            # Queries and keys are adjacent: one product rotates both.
            assert angles.qk is not None
            qk = apply_rotary_in_place(qk, angles.qk)
        q_bthd, k_btkd = qk[:, :, : config.query_heads], qk[:, :, config.query_heads :]
        if self.spec.qk_norm:
            q_bthd, k_btkd = self.q_norm(q_bthd), self.k_norm(k_btkd)
        if self.spec.rope and not rotate_together:
            q_bthd, k_btkd = apply_rotary(q_bthd, angles.q), apply_rotary(k_btkd, angles.k)
        elif not self.spec.rope:
            q_bthd = q_bthd * head_dim**-0.5
        q_btkgd = q_bthd.view(batch, time, kv_heads, config.groups, head_dim)
        return q_btkgd, k_btkd, v_btkd, F.silu(gate_btf) * up_btf
