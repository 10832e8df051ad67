"""Forward pass of a prepacked dense decoder on CPU, in preallocated buffers.

A token of a small model is a few hundred operations of a few microseconds, and most operations of
`Decoder.forward` make views. Here every view is made once, a matmul writes where the next operation reads,
and the residual stream is added to in place (times: docs/explanation/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.generate.cpu.prepacked_linear import PrepackedLinear, TransposedLinear
from koine.model.attention.context import AttentionContext
from koine.model.attention.rope import rotation
from koine.model.attention.rope_frequencies import rope_of
from koine.model.block import ParallelBlock
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder
from koine.model.norm import HeadNorm


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
    head_norms: tuple[HeadNorm, HeadNorm] | None


def _layer_of(block: Any) -> _Layer | None:
    """Return the weights of a prepacked block; None for one with experts or other matrices."""
    if type(block) is not ParallelBlock:
        return None
    config = block.config
    plain = config.norm == "layer_norm" and not config.norm_bias and not config.norm_unit_offset
    plain = plain and config.activation == "silu" and config.gated and config.residual_scale == 1.0
    if not plain or config.attention_bias or config.attention_out_bias or config.rope_scaling is not None:
        return None
    if any(spec.rope_theta is not None for spec in config.layers):
        return None
    layouts = (PrepackedLinear, TransposedLinear)
    projections: tuple[Any, Any] = (block.in_proj, block.out_proj)
    if not all(isinstance(one, layouts) for one in projections):
        return None
    head_norms = (block.q_norm, block.k_norm) if block.spec.qk_norm is not None else None
    return _Layer(block.norm.weight, *projections, block.spec.rope, head_norms)


class PrepackedDecoder:
    """`Decoder.forward` with a context, for inference only (see `build_prepacked_decoder`)."""

    def __init__(self, model: Decoder, layers: Sequence[_Layer]) -> None:
        config = model.config
        self._config, self._layers = config, layers
        self._embedding, self._norm = model.embedding.weight, model.norm.weight
        self._buffers = _Buffers(config, 1, self._embedding.dtype)
        # The rotation of the queries scales the scores, too.
        self._scales = torch.ones(config.query_heads + config.kv_heads, 1)
        self._scales[: config.query_heads] = config.score_scale
        self._rope = rope_of(config, config.layers[0])

    def __call__(self, tokens: Tensor, context: AttentionContext) -> Tensor:
        """Return the hidden states `[rows, hidden]` after the final norm of `tokens` `[rows]`."""
        config, rows = self._config, tokens.shape[0]
        if self._buffers.rows != rows:
            self._buffers = _Buffers(config, rows, self._embedding.dtype)
        buffers = self._buffers
        x = F.embedding(tokens, self._embedding)
        cis = rotation(context.positions.view(-1, 1), self._rope).cis
        assert cis is not None
        cis = cis * self._scales
        shape = (config.hidden_size,)
        for index, layer in enumerate(self._layers):
            normed = torch.layer_norm(x, shape, layer.norm, None, config.norm_eps)
            layer.in_proj.write(normed, buffers.projected)
            if layer.head_norms is not None:
                for heads, norm in zip(buffers.heads, layer.head_norms, strict=True):
                    heads.copy_(norm(heads[None])[0])
            if layer.rope:
                buffers.rotate(cis)
            else:
                buffers.q.mul_(config.score_scale)
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
