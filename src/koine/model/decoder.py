"""The decoder: parallel attention and feed-forward blocks on one bias-free LayerNorm, as in Cohere and Cohere2.

Shape legend: `[batch, time, hidden]` for the residual stream `x`; heads are laid out `[batch, time, kv_heads, groups, head_dim]`, where
`groups` query heads share one key head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koine.model.attention import attend, document_starts_of
from koine.model.config import LayerSpec, ModelConfig
from koine.model.paged_cache import PAGE, PagedCache
from koine.model.reading import Reading
from koine.model.rotary import Rotation, apply_rotary, rotation

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q `[batch, time, kv_heads, groups, head_dim]` (scaled) over what k and v `[batch, time, kv_heads, head_dim]` are added
to: `[batch, time, heads * head_dim]`."""


class Angles(NamedTuple):
    """What RoPE turns queries (the scale of the scores included) and keys by, `[batch, time, 1, head_dim / 2]`.

    both: the same for the heads of queries and keys side by side, `[batch, time, heads + kv_heads, head_dim / 2]`, where nothing is to be learnt.
    """

    q: Rotation
    k: Rotation
    both: Rotation | None


def angles_of(positions: Tensor, config: ModelConfig) -> Angles:
    """Once a forward pass, for all layers; `positions` is `[batch, time]`."""
    k = rotation(positions, config.head_dim, config.rope_theta).view_as_heads()
    q, both = k.scaled(config.head_dim**-0.5), None
    if q.turns is not None and k.turns is not None:
        heads = (config.num_heads, config.num_kv_heads)
        wide = (part.expand(-1, -1, count, -1) for part, count in zip((q.turns, k.turns), heads, strict=True))
        both = Rotation(k.cos, k.sin, torch.cat(tuple(wide), dim=2))
    return Angles(q, k, both)


class LayerNorm(nn.Module):
    """Mean-centred LayerNorm with a weight and no bias, computed in float32 (formats.md, section 1)."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            # The fused kernel keeps its statistics in float32 whatever the input is.
            return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), None, self.eps)
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
        self.out_proj = nn.Linear(
            config.attention_size + config.intermediate_size, config.hidden_size, bias=False
        )
        if spec.qk_norm:
            self.q_norm = LayerNorm(config.num_heads, config.head_dim, eps=config.norm_eps)
            self.k_norm = LayerNorm(config.num_kv_heads, config.head_dim, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        document_starts: Tensor | None = None,
        mix: Mix | None = None,
    ) -> Tensor:
        """`x` `[batch, time, hidden]` to the same; `mix` takes the place of attention over `x` itself (a cache's)."""
        q, k, v, gated = self.project(x, angles)
        if mix is None:
            mixed = attend(q, k, v, window=self.spec.window, document_starts=document_starts)
        else:
            mixed = mix(q, k, v)
        written: Tensor = self.out_proj(torch.cat((mixed, gated), dim=-1))
        return x + written

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What attention and the feed-forward half make of `x` `[batch, time, hidden]`.

        Returns q `[batch, time, kv_heads, groups, head_dim]`, rotated and scaled, k and v `[batch, time, kv_heads, head_dim]`, and the
        gated hidden units `[batch, time, intermediate]`.
        """
        config = self.config
        batch, time, kv_heads, width = *x.shape[:2], config.num_kv_heads, config.head_dim
        qk, v, gate, up = self.in_proj(self.norm(x)).split(self._sizes, dim=-1)
        qk = qk.view(batch, time, config.num_heads + kv_heads, width)
        v = v.view(batch, time, kv_heads, width)
        together = self.spec.rope and not self.spec.qk_norm and angles.both is not None
        if together:
            # Queries and keys lie side by side: one rotation turns both.
            assert angles.both is not None
            qk = apply_rotary(qk, angles.both)
        q, k = qk[:, :, : config.num_heads], qk[:, :, config.num_heads :]
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope and not together:
            q, k = apply_rotary(q, angles.q), apply_rotary(k, angles.k)
        elif not self.spec.rope:
            q = q * width**-0.5
        return q.view(batch, time, kv_heads, config.groups, width), k, v, F.silu(gate) * up


class Decoder(nn.Module):
    """A causal language model over `config.layers`; `forward` gives hidden states, `logits` scores the vocabulary.

    Set `gradient_checkpointing` to recompute each block in the backward pass in place of keeping its activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, spec) for spec in config.layers)
        self.norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.scorer: nn.Module | None = None
        """What scores the vocabulary in place of `output_weight` in a packed model (`koine.model.packed`)."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with `initializer_range` for every matrix, the two that write to the residual stream divided by
        `sqrt(2 * layers)` (GPT-2), ones for the norms."""
        std = self.config.initializer_range
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)
                elif name.endswith("out_proj.weight"):
                    parameter.normal_(0.0, std / (2 * len(self.config.layers)) ** 0.5)
                else:
                    parameter.normal_(0.0, std)

    @property
    def output_weight(self) -> Tensor:
        """The matrix that scores the vocabulary, `[vocab, hidden]`; the embedding itself where tied."""
        weight = self.embedding.weight if self.config.tie_embeddings else self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def logit_scale(self) -> float:
        """Factor on the logits."""
        return self.config.logit_scale

    def forward(
        self,
        tokens: Tensor,
        *,
        document_ids: Tensor | None = None,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reading: Reading | None = None,
        block_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: `[batch, time]` ids.
            document_ids: `[batch, time]`, equal within a document, -1 for padding: attention stays inside a document.
            positions: `[batch, time]` or `[time]`, what RoPE turns by; default 0, 1, ... (padding not counted).
            attention_mask: `[batch, time]`, 0 for padding on the left or on the right.
            reading: where these tokens stand in sequences of a `PagedCache`; it brings positions and visibility itself.
            block_outputs: a list that receives the input of the first block and each block's output.

        Returns:
            `[batch, time, hidden]`.

        Raises:
            ValueError: `document_ids`, `positions` or `attention_mask` beside a reading.
        """
        x = self.embedding(tokens)
        if reading is not None:
            if document_ids is not None or positions is not None or attention_mask is not None:
                raise ValueError("a reading knows positions, documents and padding itself")
            positions = reading.positions
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            if attention_mask is not None:
                positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        elif positions.dim() == 1:
            positions = positions[None]
        if attention_mask is not None:
            documents = torch.zeros_like(tokens) if document_ids is None else document_ids
            document_ids = documents.masked_fill(attention_mask == 0, -1)
        document_starts = None if document_ids is None else document_starts_of(document_ids)
        angles = angles_of(positions, self.config)
        if block_outputs is not None:
            block_outputs.append(x)
        for index, block in enumerate(self.blocks):
            if reading is not None:
                x = block(x, angles, None, partial(reading.attend, index))
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, angles, document_starts, use_reentrant=False)
            else:
                x = block(x, angles, document_starts)
            if block_outputs is not None:
                block_outputs.append(x)
        if reading is not None:
            reading.finish()
        out = self.norm(x)
        assert isinstance(out, Tensor)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary: `[..., hidden]` to `[..., vocab]`, times `logit_scale`."""
        if self.scorer is not None:
            scores: Tensor = self.scorer(hidden)
            return scores.mul_(self.config.logit_scale)
        return F.linear(hidden, self.output_weight) * self.config.logit_scale

    def new_cache(self, *, page: int = PAGE, max_pages: int | None = None) -> PagedCache:
        """An empty cache in the dtype and on the device of the weights."""
        weight = self.embedding.weight
        return PagedCache(self.config, weight.dtype, weight.device, page=page, max_pages=max_pages)
