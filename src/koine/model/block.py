"""The decoder's blocks: attention and feed-forward, in parallel or one after the other (`Arrangement`).

Shape suffixes: b batch, t time, k kv_heads, g groups (query heads of one key head), h query heads = k * g,
d head_dim, a = h * d, e hidden_size, f intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from koine.model.attention.dispatch import attend
from koine.model.attention.rope import Rotation, apply_rotary, apply_rotary_in_place, rotation
from koine.model.attention.rope_frequencies import Rope, rope_of
from koine.model.config import LayerSpec, ModelConfig
from koine.model.feed_forward import hidden_units
from koine.model.linear import Linear, linear
from koine.model.moe.routers import Routing
from koine.model.norm import HeadNorm, Norm

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


def rope_angles(positions: Tensor, config: ModelConfig, lengths: Tensor | None = None) -> dict[Rope, Angles]:
    """Compute RoPE's tables for `positions` `[batch, time]`, once a forward pass.

    Layers with the same base and scaling share them. lengths: see `rotation`.
    """
    ropes = {rope_of(config, spec) for spec in config.layers if spec.rope}
    return {rope: _angles(positions, rope, config, lengths) for rope in ropes}


def _angles(positions: Tensor, rope: Rope, config: ModelConfig, lengths: Tensor | None) -> Angles:
    k = rotation(positions, rope, lengths).view_as_heads()
    q, qk = k.scaled(config.score_scale), None
    if q.cis is not None and k.cis is not None:
        heads = (config.query_heads, config.kv_heads)
        expanded = (cis.expand(-1, -1, count, -1) for cis, count in zip((q.cis, k.cis), heads, strict=True))
        qk = Rotation(k.cos, k.sin, torch.cat(tuple(expanded), dim=2))
    return Angles(q, k, qk)


class Block(nn.Module):
    """The part that both kinds of block share: the heads of q and k, and attention."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        if spec.qk_norm is not None:
            grouped = config.query_copies == config.kv_copies
            self.q_norm, self.k_norm = (
                HeadNorm(spec.qk_norm, heads, copies, config, grouped=grouped, key_heads=config.kv_heads)
                for heads, copies in (
                    (config.query_heads, config.query_copies),
                    (config.kv_heads, config.kv_copies),
                )
            )

    @property
    def rope(self) -> Rope | None:
        """The rotation of this layer; None without one."""
        return rope_of(self.config, self.spec) if self.spec.rope else None

    def qkv(self, x: Tensor) -> Tensor:
        """Project the block's input `[..., hidden]` to q, k and v side by side."""
        raise NotImplementedError

    def heads(self, qkv: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """Split the projected q, k and v into heads, normalise and rotate them.

        Args:
            qkv: `[batch, time, attention_size + 2 * kv_size]`. The caller must own it.
            angles: RoPE's tables; None without RoPE.

        Returns:
            q `[batch, time, kv_heads, groups, head_dim]`, rotated and scaled; k and v
            `[batch, time, kv_heads, head_dim]`.
        """
        config = self.config
        batch, time, kv_heads, head_dim = *qkv.shape[:2], config.kv_heads, config.head_dim
        qk, v = qkv.split_with_sizes((config.attention_size + config.kv_size, config.kv_size), dim=-1)
        qk = qk.view(batch, time, config.query_heads + kv_heads, head_dim)
        v_btkd = v.view(batch, time, kv_heads, head_dim)
        normed = self.spec.qk_norm is not None
        rotate_together = angles is not None and not normed and angles.qk is not None
        if rotate_together:
            # Queries and keys are adjacent: one product rotates both.
            assert angles is not None
            assert angles.qk is not None
            qk = apply_rotary_in_place(qk, angles.qk)
        q_bthd, k_btkd = qk[:, :, : config.query_heads], qk[:, :, config.query_heads :]
        if normed:
            q_bthd, k_btkd = self.q_norm(q_bthd), self.k_norm(k_btkd)
        if angles is None:
            q_bthd = q_bthd * config.score_scale
        elif not rotate_together:
            q_bthd, k_btkd = apply_rotary(q_bthd, angles.q), apply_rotary(k_btkd, angles.k)
        return q_bthd.view(batch, time, kv_heads, config.groups, head_dim), k_btkd, v_btkd

    def attend(
        self,
        qkv: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None,
        attention: AttentionFn | None,
    ) -> Tensor:
        """Compute the attention heads `[batch, time, heads * head_dim]` from the projected q, k and v."""
        q, k, v = self.heads(qkv, angles)
        if attention is not None:
            return attention(q, k, v)
        return attend(
            q,
            k,
            v,
            window=self.spec.window,
            document_starts=document_starts,
            softcap=self.config.attention_softcap,
        )

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """Add a sublayer's output to the residual stream."""
        scale = self.config.residual_scale
        return x + out if scale == 1.0 else torch.add(x, out, alpha=scale)


class ParallelBlock(Block):
    """`x + attention(norm(x)) + feed_forward(norm(x))`.

    The five projections of `norm(x)` (q, k, v, gate, up) are one matrix, and the two output projections
    (attention, down) are another: two large matmuls in place of seven.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.norm = Norm(config.hidden_size, config)
        self.in_proj = Linear(config.hidden_size, sum(config.projection_sizes), bias=False)
        self.out_proj = Linear(
            config.attention_size + config.dense_size, config.hidden_size, bias=config.has_out_bias
        )
        self._qkv_size = config.attention_size + 2 * config.kv_size
        if config.attention_bias:
            self.qkv_bias = nn.Parameter(torch.zeros(self._qkv_size))

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Compute the block.

        Args:
            x: `[batch, time, hidden]`.
            angles: RoPE's tables; None for a layer without RoPE.
            document_starts: `[batch, time]`, see `koine.model.attention.dispatch.attend`.
            attention: that of a KV cache; None: attention over `x` itself.

        Returns:
            The output, of the shape of `x`, and how the tokens were routed (None without experts).
        """
        attended_bta, hidden_btf = self.branches(self.norm(x), angles, document_starts, attention)
        return self.add(x, self.out_proj(torch.cat((attended_bta, hidden_btf), dim=-1))), None

    def branches(
        self,
        normed: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None,
        attention: AttentionFn | None,
    ) -> tuple[Tensor, Tensor]:
        """Compute the two inputs of the output projection.

        Returns:
            The attention heads `[batch, time, heads * head_dim]`, and the feed-forward's hidden units
            `[batch, time, intermediate]`.
        """
        gate_size, up_size = self.config.projection_sizes[3:]
        qkv, gate_btf, up_btf = self.in_proj(normed).split_with_sizes(
            (self._qkv_size, gate_size, up_size), dim=-1
        )
        if self.config.attention_bias:
            qkv = qkv + self.qkv_bias
        hidden_btf = hidden_units(gate_btf, up_btf, self.config.activation)
        return self.attend(qkv, angles, document_starts, attention), hidden_btf

    def qkv(self, x: Tensor) -> Tensor:
        """Project the block's input `[..., hidden]` to q, k and v side by side."""
        if type(self.in_proj) is not nn.Linear:
            # A LoRA adapter adds to it.
            projected: Tensor = self.in_proj(self.norm(x))[..., : self._qkv_size]
            return projected + self.qkv_bias if self.config.attention_bias else projected
        weight = self.in_proj.weight[: self._qkv_size]
        return linear(self.norm(x), weight, self.qkv_bias if self.config.attention_bias else None)


class SequentialBlock(Block):
    """Attention, then feed-forward, each added to the residual stream; norms before or after, or both.

    q, k and v are one matrix, and so are gate and up.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        hidden = config.hidden_size
        before = config.arrangement in ("pre_norm", "sandwich")
        after = config.arrangement in ("post_norm", "sandwich")
        self.attention_norm = Norm(hidden, config) if before else nn.Identity()
        self.qkv_proj = Linear(hidden, config.attention_size + 2 * config.kv_size, bias=config.attention_bias)
        self.o_proj = Linear(config.attention_size, hidden, bias=config.has_out_bias)
        self.attention_out_norm = Norm(hidden, config) if after else nn.Identity()
        self.feed_forward_norm = Norm(hidden, config) if before else nn.Identity()
        gate_up = sum(config.projection_sizes[3:])
        if gate_up:
            self.gate_up_proj = Linear(hidden, gate_up, bias=config.mlp_bias)
            self.down_proj = Linear(config.dense_size, hidden, bias=config.mlp_bias)
        self.feed_forward_out_norm = Norm(hidden, config) if after else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Compute the block; arguments and results as in `ParallelBlock.forward`."""
        qkv = self.qkv_proj(self.attention_norm(x))
        attended_bta = self.attend(qkv, angles, document_starts, attention)
        x = self.add(x, self.attention_out_norm(self.o_proj(attended_bta)))
        out_bte = self.feed_forward(self.feed_forward_norm(x))
        return self.add(x, self.feed_forward_out_norm(out_bte)), None

    def feed_forward(self, normed: Tensor) -> Tensor:
        """Compute the dense feed-forward of `[..., hidden]`."""
        gate, up = self.gate_up_proj(normed).split_with_sizes(self.config.projection_sizes[3:], dim=-1)
        out: Tensor = self.down_proj(hidden_units(gate, up, self.config.activation))
        return out

    def qkv(self, x: Tensor) -> Tensor:
        """Project the block's input `[..., hidden]` to q, k and v side by side."""
        projected: Tensor = self.qkv_proj(self.attention_norm(x))
        return projected
