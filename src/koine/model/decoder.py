"""The decoder: parallel attention and feed-forward blocks on one bias-free LayerNorm, as in Cohere and Cohere2.

Shape legend: `[batch, time, hidden]` for the residual stream `x`; heads are laid out `[batch, time, kv_heads, groups, head_dim]`, where
`groups` query heads share one key head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koine.model.attention import attend, attend_cached, document_starts_of
from koine.model.cache import Cache, LayerCache
from koine.model.config import LayerSpec, ModelConfig
from koine.model.rotary import Rotation, apply_rotary, rotation


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
        angles: Rotation,
        document_starts: Tensor | None = None,
        cache: LayerCache | None = None,
        cached: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """`x` `[batch, time, hidden]` to the same; `cached` is (positions read before, padding `[batch]`)."""
        config = self.config
        q, k, v, gate, up = self.in_proj(self.norm(x)).split(config.projection_sizes, dim=-1)
        q = q.unflatten(-1, (config.num_heads, config.head_dim))
        k = k.unflatten(-1, (config.num_kv_heads, config.head_dim))
        v = v.unflatten(-1, (config.num_kv_heads, config.head_dim))
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.spec.rope:
            # The scale of the scores is a rotation's worth of work on its own; here it rides on the tables.
            scale = config.head_dim**-0.5
            q = apply_rotary(q, Rotation(angles.cos * scale, angles.sin * scale))
            k = apply_rotary(k, angles)
        else:
            q = q * config.head_dim**-0.5
        q = q.unflatten(-2, (config.num_kv_heads, config.groups))
        if cache is None:
            mixed = attend(q, k, v, window=self.spec.window, document_starts=document_starts)
        else:
            assert cached is not None
            before, padding = cached
            first_position = before - cache.positions
            keys, values = cache.extend(k.transpose(1, 2), v.transpose(1, 2))
            mixed = attend_cached(
                q, keys, values, window=self.spec.window, first_position=first_position, padding=padding
            )
        written: Tensor = self.out_proj(torch.cat((mixed, F.silu(gate) * up), dim=-1))
        return x + written


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
        cache: Cache | None = None,
        block_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: `[batch, time]` ids.
            document_ids: `[batch, time]`, equal within a document, -1 for padding: attention stays inside a document.
            positions: `[batch, time]` or `[time]`, what RoPE turns by; default 0, 1, ... (after the cached ones; padding not
                counted).
            attention_mask: `[batch, time]`, 0 for padding on the left or on the right; with a cache on the left alone, given with
                the first call, and the padding is left out ever after.
            cache: what earlier calls have read; extended in place.
            block_outputs: a list that receives the input of the first block and each block's output.

        Returns:
            `[batch, time, hidden]`.

        Raises:
            ValueError: what a cache cannot follow: `document_ids`, or a mask that comes late or pads on the right.
        """
        time = tokens.shape[1]
        x = self.embedding(tokens)
        before = 0 if cache is None else cache.length
        if cache is not None:
            if document_ids is not None:
                raise ValueError("document_ids with a cache: a row that is read on holds one document")
            if attention_mask is not None:
                cache.padding = left_padding(attention_mask, before)
        if positions is None:
            positions = torch.arange(before, before + time, device=tokens.device)[None]
            if cache is not None:
                positions = (positions - cache.padding[:, None]).clamp(min=0)
            elif attention_mask is not None:
                positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        elif positions.dim() == 1:
            positions = positions[None]
        if attention_mask is not None and cache is None:
            documents = torch.zeros_like(tokens) if document_ids is None else document_ids
            document_ids = documents.masked_fill(attention_mask == 0, -1)
        document_starts = None if document_ids is None else document_starts_of(document_ids)
        angles = rotation(positions, self.config.head_dim, self.config.rope_theta).view_as_heads()
        if block_outputs is not None:
            block_outputs.append(x)
        for index, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, angles, None, cache.layers[index], (before, cache.padding))
            elif self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, angles, document_starts, use_reentrant=False)
            else:
                x = block(x, angles, document_starts)
            if block_outputs is not None:
                block_outputs.append(x)
        if cache is not None:
            cache.length += time
        out = self.norm(x)
        assert isinstance(out, Tensor)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the vocabulary: `[..., hidden]` to `[..., vocab]`, times `logit_scale`."""
        return F.linear(hidden, self.output_weight) * self.config.logit_scale

    def new_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` rows, in the dtype and on the device of the weights."""
        return Cache(self.config, batch_size, self.embedding.weight.dtype, self.embedding.weight.device)


def left_padding(attention_mask: Tensor, before: int) -> Tensor:
    """Positions of padding on the left of each row, `[batch]`, from the mask of a cache's first call."""
    if before:
        raise ValueError(
            "attention_mask after the first call with a cache: the cache keeps the padding itself"
        )
    seen = attention_mask != 0
    if (seen[:, :-1] & ~seen[:, 1:]).any():
        raise ValueError("attention_mask pads on the right: with a cache, pad on the left")
    return (~seen).sum(dim=1)
