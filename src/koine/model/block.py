"""The decoder's block: parallel attention and feed-forward halves on one bias-free LayerNorm, as in Cohere and Cohere2.

Heads are laid out `[batch, time, kv_heads, groups, head_dim]`, where `groups` query heads share one key head.
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
"""Attention of q `[batch, time, kv_heads, groups, head_dim]` (scaled) over what k and v `[batch, time, kv_heads, head_dim]` are added
to: `[batch, time, heads * head_dim]`."""


class Angles(NamedTuple):
    """What RoPE turns queries (the scale of the scores included) and keys by, `[batch, time, 1, head_dim / 2]`.

    both: the same for the heads of queries and keys side by side, `[batch, time, heads + kv_heads, head_dim / 2]`, where nothing is to be learnt.
    """

    q: Rotation
    k: Rotation
    qk: Rotation | None


def rope_angles(positions: Tensor, config: ModelConfig) -> Angles:
    """Once a forward pass, for all layers; `positions` is `[batch, time]`."""
    k = rotation(positions, config.head_dim, config.rope_theta).view_as_heads()
    q, qk = k.scaled(config.head_dim**-0.5), None
    if q.cis is not None and k.cis is not None:
        heads = (config.query_heads, config.kv_heads)
        wide = (part.expand(-1, -1, count, -1) for part, count in zip((q.cis, k.cis), heads, strict=True))
        qk = Rotation(k.cos, k.sin, torch.cat(tuple(wide), dim=2))
    return Angles(q, k, qk)


class LayerNorm(nn.Module):
    """Mean-centred LayerNorm with a weight and no bias, computed in float32 (formats.md, section 1)."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))
        self.eps, self._vector = eps, len(shape) == 1

    def forward(self, x: Tensor) -> Tensor:
        if self._vector:
            # The fused kernel keeps its statistics in float32 whatever the input is.
            weight = self.weight.to(x.dtype)
            return torch.layer_norm(x, weight.shape, weight, None, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.layer_norm(wide, x.shape[-1:], None, None, self.eps)
        return (normed * self.weight).to(x.dtype)


class Block(nn.Module):
    """`x + attention(norm(x)) + feed_forward(norm(x))`.

    The five projections that read `norm(x)` (q, k, v, gate, up) are one matrix, and the two that write back (attention output
    and down) are another: two large matmuls in place of seven.
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
        """`x` `[batch, time, hidden]` to the same, and how its tokens were routed (None: there are no experts).

        mix: takes the place of attention over `x` itself (a cache's).
        """
        mixed, gated = self.branches(self.norm(x), angles, document_starts, attention)
        written: Tensor = self.out_proj(torch.cat((mixed, gated), dim=-1))
        return x + written, None

    def branches(
        self, normed: Tensor, angles: Angles, document_starts: Tensor | None, attention: AttentionFn | None
    ) -> tuple[Tensor, Tensor]:
        """What the output projection reads: mixed values `[batch, time, heads * head_dim]` and gated units `[batch, time, intermediate]`."""
        q, k, v, gated = self.project(normed, angles)
        if attention is None:
            return attend(q, k, v, window=self.spec.window, document_starts=document_starts), gated
        return attention(q, k, v), gated

    def project(self, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What attention and the feed-forward half make of the normalised input `[batch, time, hidden]`.

        Returns q `[batch, time, kv_heads, groups, head_dim]`, rotated and scaled, k and v `[batch, time, kv_heads, head_dim]`, and the
        gated hidden units `[batch, time, intermediate]`.
        """
        config = self.config
        batch, time, kv_heads, width = *normed.shape[:2], config.kv_heads, config.head_dim
        qk, v, gate, up = self.in_proj(normed).split_with_sizes(self._sizes, dim=-1)
        qk = qk.view(batch, time, config.query_heads + kv_heads, width)
        v = v.view(batch, time, kv_heads, width)
        together = self.spec.rope and not self.spec.qk_norm and angles.qk is not None
        if together:
            # Queries and keys lie side by side: one rotation turns both.
            assert angles.qk is not None
            qk = apply_rotary_in_place(qk, angles.qk)
        q, k = qk[:, :, : config.query_heads], qk[:, :, config.query_heads :]
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope and not together:
            q, k = apply_rotary(q, angles.q), apply_rotary(k, angles.k)
        elif not self.spec.rope:
            q = q * width**-0.5
        return q.view(batch, time, kv_heads, config.groups, width), k, v, F.silu(gate) * up
