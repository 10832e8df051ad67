"""Forward pass of a prepacked dense decoder on CPU, in preallocated buffers.

A token of a small model is a few hundred operations of a few microseconds, and most operations of
`Decoder.forward` make views. Here every view is made once, a matmul writes where the next operation reads,
and the residual stream is added to in place (times: docs/explanation/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.generate.cpu.prepacked_linear import PrepackedLinear, TransposedLinear
from koine.model.attention.context import AttentionContext
from koine.model.attention.rope import rotation
from koine.model.block import Block, LayerNorm
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder


class _Buffers:
    """Buffers of the layers for a number of tokens (rows), and views of them.

    projected: output of the input projection; `q`, `new` (keys and values), `gate` and `up` are its parts.
    heads: queries and keys in `projected`, by heads. rotated: the same, as pairs of numbers.
    pairs: the same as complex numbers, in float32 only.
    written: input of the output projection; `mixed` (attention) and `gated` (feed-forward) are its parts.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> None:
        queries, keys, values, _, inner = config.projection_sizes
        qk_size = queries + keys
        width, kv_heads = config.head_dim, config.kv_heads
        self.rows = rows
        self.projected = torch.empty(rows, sum(config.projection_sizes), dtype=dtype)
        self.written = torch.empty(rows, queries + inner, dtype=dtype)
        self.heads = (
            self.projected[:, :qk_size]
            .view(rows, -1, width)
            .split_with_sizes((config.query_heads, kv_heads), dim=1)
        )
        self.rotated = self.projected[:, :qk_size].view(rows, -1, width // 2, 2)
        self.pairs = torch.view_as_complex(self.rotated) if dtype == torch.float32 else None
        self.q = self.projected[:, :queries].view(rows, kv_heads, config.groups, width)
        self.new = (
            self.projected[:, queries : qk_size + values].view(rows, 2, kv_heads, width).transpose(0, 1)
        )
        self.gate = self.projected[:, qk_size + values : -inner]
        self.up = self.projected[:, -inner:]
        self.mixed = self.written[:, :queries].view(rows, kv_heads, config.groups, width)
        self.gated = self.written[:, queries:]

    def rotate(self, cis: Tensor) -> None:
        """Apply RoPE: multiply queries and keys by complex `[rows, heads + kv_heads, head_dim / 2]`."""
        if self.pairs is not None:
            self.pairs.mul_(cis)
        else:
            self.rotated.copy_(torch.view_as_real(torch.view_as_complex(self.rotated.float()).mul_(cis)))


@dataclass(frozen=True)
class _Layer:
    """Weights of one block.

    head_norms: of queries and of keys (QK-Norm).
    """

    norm: Tensor
    in_proj: PrepackedLinear | TransposedLinear
    out_proj: PrepackedLinear | TransposedLinear
    rope: bool
    head_norms: tuple[LayerNorm, LayerNorm] | None


def _layer_of(block: nn.Module) -> _Layer | None:
    """Return the weights of a prepacked block; None for one with experts or other matrices."""
    if type(block) is not Block:
        return None
    layouts = (PrepackedLinear, TransposedLinear)
    if not isinstance(block.in_proj, layouts) or not isinstance(block.out_proj, layouts):
        return None
    head_norms = (block.q_norm, block.k_norm) if block.spec.qk_norm else None
    return _Layer(block.norm.weight, block.in_proj, block.out_proj, block.spec.rope, head_norms)


class PrepackedDecoder:
    """`Decoder.forward` with a context, for inference only (see `build_prepacked_decoder`)."""

    def __init__(self, model: Decoder, layers: Sequence[_Layer]) -> None:
        config = model.config
        self._config, self._layers = config, layers
        self._embedding, self._norm = model.embedding.weight, model.norm.weight
        self._buffers = _Buffers(config, 1, self._embedding.dtype)
        # The rotation of the queries scales the scores, too.
        self._scales = torch.ones(config.query_heads + config.kv_heads, 1)
        self._scales[: config.query_heads] = config.head_dim**-0.5

    def __call__(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Return the hidden states `[rows, hidden]` after the final norm of `tokens` `[rows]`."""
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


def build_prepacked_decoder(model: Decoder) -> PrepackedDecoder | None:
    """Return the forward pass of a dense model that is prepacked (`prepacked_linear`); None for others."""
    layers = [_layer_of(block) for block in model.blocks]
    prepacked = [layer for layer in layers if layer is not None]
    return PrepackedDecoder(model, prepacked) if len(prepacked) == len(layers) else None
