"""Reading tokens into a cache through a packed model, in buffers that stay from one forward pass to the next.

A token of a small model is a few hundred operations of a few microseconds, and most of those of `Decoder.forward` make views. Here every view is made
once, a product writes where the next operation reads, and the residual stream is added to in place (docs/explanation/log.md has the times).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.generate.cpu.prepacked_linear import PackedLinear, TransposedLinear
from koine.model.attention.context import AttentionContext
from koine.model.attention.rope import rotation
from koine.model.block import Block, LayerNorm
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder


class _Buffers:
    """What the layers write, for so many tokens (rows).

    heads: queries and keys of `projected` by heads; pairs: the same as complex numbers, in float32; `q`, `new`, `gate`, `up` are its parts, `mixed` and
    `gated` those of `written`.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> None:
        queries, keys, values, _, inner = config.projection_sizes
        turned = queries + keys
        width, kv_heads = config.head_dim, config.kv_heads
        self.rows = rows
        self.projected = torch.empty(rows, sum(config.projection_sizes), dtype=dtype)
        self.written = torch.empty(rows, queries + inner, dtype=dtype)
        self.heads = (
            self.projected[:, :turned]
            .view(rows, -1, width)
            .split_with_sizes((config.query_heads, kv_heads), dim=1)
        )
        self.turned = self.projected[:, :turned].view(rows, -1, width // 2, 2)
        self.pairs = torch.view_as_complex(self.turned) if dtype == torch.float32 else None
        self.q = self.projected[:, :queries].view(rows, kv_heads, config.groups, width)
        self.new = self.projected[:, queries : turned + values].view(rows, 2, kv_heads, width).transpose(0, 1)
        self.gate = self.projected[:, turned + values : -inner]
        self.up = self.projected[:, -inner:]
        self.mixed = self.written[:, :queries].view(rows, kv_heads, config.groups, width)
        self.gated = self.written[:, queries:]

    def rotate(self, cis: Tensor) -> None:
        """Turn queries and keys by complex numbers `[rows, heads + kv_heads, head_dim / 2]`."""
        if self.pairs is not None:
            self.pairs.mul_(cis)
        else:
            self.turned.copy_(torch.view_as_real(torch.view_as_complex(self.turned.float()).mul_(cis)))


@dataclass(frozen=True)
class _Layer:
    """What a forward pass needs of a block."""

    norm: Tensor
    in_proj: PackedLinear | TransposedLinear
    out_proj: PackedLinear | TransposedLinear
    rope: bool
    head_norms: tuple[LayerNorm, LayerNorm] | None
    """Of queries and of keys (QK-Norm)."""


def _layer_of(block: nn.Module) -> _Layer | None:
    """A block as a packed model has it; None where it has experts or matrices that are not packed."""
    if type(block) is not Block:
        return None
    layouts = (PackedLinear, TransposedLinear)
    if not isinstance(block.in_proj, layouts) or not isinstance(block.out_proj, layouts):
        return None
    head_norms = (block.q_norm, block.k_norm) if block.spec.qk_norm else None
    return _Layer(block.norm.weight, block.in_proj, block.out_proj, block.spec.rope, head_norms)


class PackedForward:
    """What `Decoder.forward` does with a reading, in inference mode alone. `packed_forward_of` makes it."""

    def __init__(self, model: Decoder, layers: Sequence[_Layer]) -> None:
        config = model.config
        self._config, self._layers = config, layers
        self._embedding, self._norm = model.embedding.weight, model.norm.weight
        self._buffers = _Buffers(config, 1, self._embedding.dtype)
        # The scale of the scores rides on the rotation of the queries.
        self._scales = torch.ones(config.query_heads + config.kv_heads, 1)
        self._scales[: config.query_heads] = config.head_dim**-0.5

    def __call__(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Hidden states `[rows, hidden]` after the final norm, of the reading's `tokens` `[rows]`."""
        config, rows = self._config, tokens.shape[0]
        if self._buffers.rows != rows:
            self._buffers = _Buffers(config, rows, self._embedding.dtype)
        buffers = self._buffers
        x = F.embedding(tokens, self._embedding)
        cis = rotation(context.positions.view(-1, 1), config.head_dim, config.rope_theta).cis
        assert cis is not None
        cis = cis * self._scales
        shape = (config.hidden_size,)
        for index, layer in enumerate(self._layers):
            normed = torch.layer_norm(x, shape, layer.norm, None, config.norm_eps)
            layer.in_proj.write(normed, buffers.projected)
            if layer.head_norms is not None:
                for heads, norm in zip(buffers.heads, layer.head_norms, strict=True):
                    heads.copy_(norm(heads))
            if layer.rope:
                buffers.rotate(cis)
            else:
                buffers.q.mul_(config.head_dim**-0.5)
            buffers.mixed.copy_(context.attend_packed(index, buffers.q, buffers.new))
            torch.mul(F.silu(buffers.gate, inplace=True), buffers.up, out=buffers.gated)
            layer.out_proj.add_to(buffers.written, x)
        context.finish()
        return torch.layer_norm(x, shape, self._norm, None, config.norm_eps)


def packed_forward_of(model: Decoder) -> PackedForward | None:
    """For a packed dense model (`koine.generate.cpu.prepacked_linear`); None for others, which `Decoder.forward` reads."""
    layers = [_layer_of(block) for block in model.blocks]
    whole = [layer for layer in layers if layer is not None]
    return PackedForward(model, whole) if len(whole) == len(layers) else None
