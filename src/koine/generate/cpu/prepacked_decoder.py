"""Forward pass of a prepacked dense decoder on CPU, in preallocated buffers.

A token of a small model is a few hundred operations of a few microseconds, and most operations of
`Decoder.forward` make views. Here a pass is a list of operations whose inputs and outputs are fixed: it is
built once for a number of tokens, from the specification of each layer, and run at every step. A matmul
writes where the next operation reads, and the residual stream is added to in place (times:
docs/explanation/log.md).

Shapes: n tokens (rows), h query heads, k key heads, d head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from koine.generate.cpu.one_row import Operation
from koine.generate.cpu.operations import activate, normalise, normalise_heads
from koine.generate.cpu.prepacked_linear import PrepackedLinear, TransposedLinear
from koine.generate.cpu.rope_table import RopeTable
from koine.model.attention.context import PackedAttentionContext
from koine.model.attention.rope_frequencies import Rope
from koine.model.block import Block, ParallelBlock, SequentialBlock
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder
from koine.model.norm import Norm

MOST_ROWS = 256
"""Tokens of a pass up to which its operations are short, so that buffers help."""


class _Buffers:
    """Buffers of all layers for a number of tokens (rows), and views of them.

    x: the residual stream. normed: input of a projection. out: output of a sublayer before its norm.
    single: float32 scratch of a norm.
    projected: output of the projections to q, k, v, gate and up, side by side as in a parallel block.
    `queries_nhd`, `qkv`, `gate` and `up` are parts of it, and so are `q_nkgd` and `new_2nkd` (keys and values).
    written: input of a parallel block's output projection; `attended` and `hidden` are its parts.
    heads_nhd: queries and keys in float32: a part of `projected`, or a copy where that is bfloat16.
    pairs: the same as complex numbers.
    rotations: by rope, the factors of `pairs`.
    """

    def __init__(self, config: ModelConfig, rows: int, dtype: torch.dtype) -> None:
        queries, keys, values, gate, inner = config.projection_sizes
        qk, size, heads = queries + keys, config.head_dim, config.query_heads + config.kv_heads
        parallel = config.arrangement == "parallel"
        hidden = config.hidden_size
        self.x, self.normed, self.out = (torch.empty(rows, hidden, dtype=dtype) for _ in range(3))
        self.single = torch.empty(rows, hidden)
        # Contiguous for a projection of its own, adjacent for a common one.
        if parallel:
            self.projected = torch.empty(rows, qk + values + gate + inner, dtype=dtype)
            self.qkv, self.gate_up = self.projected.split_with_sizes((qk + values, gate + inner), dim=1)
            self.written = torch.empty(rows, queries + inner, dtype=dtype)
            self.attended, self.hidden = self.written.split_with_sizes((queries, inner), dim=1)
        else:
            self.qkv = torch.empty(rows, qk + values, dtype=dtype)
            self.gate_up = torch.empty(rows, gate + inner, dtype=dtype)
            self.attended = torch.empty(rows, queries, dtype=dtype)
            self.hidden = torch.empty(rows, inner, dtype=dtype)
        self.gate, self.up = self.gate_up.split_with_sizes((gate, inner), dim=1)
        self.stored_heads_nhd = self.qkv[:, :qk].view(rows, heads, size)
        self.q_nkgd = self.qkv[:, :queries].view(rows, config.kv_heads, config.groups, size)
        self.new_2nkd = self.qkv[:, queries:].view(rows, 2, config.kv_heads, size).transpose(0, 1)
        self.attended_nkgd = self.attended.view(rows, config.kv_heads, config.groups, size)
        self.heads_nhd = self.stored_heads_nhd if dtype == torch.float32 else torch.empty(rows, heads, size)
        self.pairs = torch.view_as_complex(self.heads_nhd.view(rows, heads, size // 2, 2))


class _Pass:
    """The operations of one forward pass over `rows` tokens, bound to buffers."""

    def __init__(self, model: Decoder, tables: dict[Rope, RopeTable], rows: int) -> None:
        self._config, self._tables = model.config, tables
        self.rows = rows
        self._embedding = model.embedding.weight
        self._buffers = _Buffers(model.config, rows, self._embedding.dtype)
        heads = model.config.query_heads + model.config.kv_heads
        shape = (rows, heads, model.config.head_dim // 2)
        self._rotations = {rope: torch.empty(shape, dtype=torch.complex64) for rope in tables}
        self._context: PackedAttentionContext
        self._operations: list[Operation] = []
        # Gemma rounds the factor to the dtype of the weights.
        scale = torch.tensor(model.config.embedding_scale, dtype=self._embedding.dtype)
        if model.config.embedding_scale != 1.0:
            self._operations.append(partial(self._buffers.x.mul_, scale))
        for index, block in enumerate(model.blocks):
            if isinstance(block, ParallelBlock):
                self._add_parallel(index, block)
            else:
                assert isinstance(block, SequentialBlock)
                self._add_sequential(index, block)
        self._add_norm(model.norm, self._buffers.x, self._buffers.normed)

    def run(self, tokens: Tensor, context: PackedAttentionContext) -> Tensor:
        """Return the hidden states `[rows, hidden]` after the final norm; the next pass overwrites them."""
        torch.index_select(self._embedding, 0, tokens, out=self._buffers.x)
        for rope, table in self._tables.items():
            table.write(context.positions, self._rotations[rope])
        self._context = context
        for operation in self._operations:
            operation()
        context.finish()
        return self._buffers.normed

    def _add_parallel(self, index: int, block: ParallelBlock) -> None:
        buffers = self._buffers
        in_proj, out_proj = _packed(block.in_proj), _packed(block.out_proj)
        self._add_norm(block.norm, buffers.x, buffers.normed)
        self._operations += in_proj.write(buffers.normed, buffers.projected)
        if self._config.attention_bias:
            self._operations.append(partial(buffers.qkv.add_, block.qkv_bias))
        self._add_attention(index, block)
        self._operations.append(activate(buffers.gate, buffers.up, buffers.hidden, self._config.activation))
        self._operations += out_proj.add_to(buffers.written, buffers.x, self._config.residual_scale)

    def _add_sequential(self, index: int, block: SequentialBlock) -> None:
        buffers = self._buffers
        normed = self._add_norm(block.attention_norm, buffers.x, buffers.normed)
        self._operations += _packed(block.qkv_proj).write(normed, buffers.qkv)
        self._add_attention(index, block)
        self._add_output(_packed(block.o_proj), buffers.attended, block.attention_out_norm)
        normed = self._add_norm(block.feed_forward_norm, buffers.x, buffers.normed)
        self._operations += _packed(block.gate_up_proj).write(normed, buffers.gate_up)
        self._operations.append(activate(buffers.gate, buffers.up, buffers.hidden, self._config.activation))
        self._add_output(_packed(block.down_proj), buffers.hidden, block.feed_forward_out_norm)

    def _add_attention(self, index: int, block: Block) -> None:
        """Normalise and rotate the heads of `qkv`, then attend: from `qkv` to `attended`."""
        buffers, operations, config = self._buffers, self._operations, self._config
        qk_norm, rope = block.spec.qk_norm, block.rope
        copied = buffers.heads_nhd is not buffers.stored_heads_nhd and (
            qk_norm is not None or rope is not None
        )
        if copied:
            operations.append(partial(buffers.heads_nhd.copy_, buffers.stored_heads_nhd))
        if qk_norm is not None:
            operations += normalise_heads(block.q_norm, block.k_norm, buffers.heads_nhd)
        if rope is not None:
            # The rotation of the queries scales the scores, too.
            operations.append(partial(buffers.pairs.mul_, self._rotations[rope]))
        if copied:
            operations.append(partial(buffers.stored_heads_nhd.copy_, buffers.heads_nhd))
        if rope is None:
            operations.append(partial(buffers.q_nkgd.mul_, config.score_scale))
        q, new, attended = buffers.q_nkgd, buffers.new_2nkd, buffers.attended_nkgd
        operations.append(lambda: attended.copy_(self._context.attend_packed(index, q, new)))

    def _add_output(self, linear: PrepackedLinear | TransposedLinear, x: Tensor, norm: Any) -> None:
        """Add a sublayer's output to the residual stream."""
        buffers, scale = self._buffers, self._config.residual_scale
        if not isinstance(norm, Norm):
            self._operations += linear.add_to(x, buffers.x, scale)
            return
        self._operations += linear.write(x, buffers.out)
        self._add_norm(norm, buffers.out, buffers.normed)
        self._operations.append(partial(buffers.x.add_, buffers.normed, alpha=scale))

    def _add_norm(self, norm: Any, x: Tensor, out: Tensor) -> Tensor:
        """Normalise `x` into `out`, and return where the result is: in `x` where a block has no norm."""
        if not isinstance(norm, Norm):
            return x
        self._operations += normalise(norm, x, out, self._buffers.single)
        return out


def _packed(linear: Any) -> PrepackedLinear | TransposedLinear:
    assert isinstance(linear, PrepackedLinear | TransposedLinear)
    return linear


class PrepackedDecoder:
    """`Decoder.forward` with a context, for inference only (see `build_prepacked_decoder`)."""

    def __init__(self, model: Decoder) -> None:
        self._model = model
        ropes = {block.rope for block in model.blocks if isinstance(block, Block)}
        self._tables = {rope: RopeTable(rope, model.config) for rope in ropes if rope is not None}
        self._one = _Pass(model, self._tables, 1)
        self._several = self._one

    def __call__(self, tokens: Tensor, context: PackedAttentionContext) -> Tensor:
        """Return the hidden states `[rows, hidden]` after the final norm of `tokens` `[rows]`."""
        rows = tokens.shape[0]
        if rows > MOST_ROWS:
            hidden: Tensor = self._model(tokens.view(context.positions.shape), context=context)
            return hidden.flatten(0, 1)
        if rows == 1:
            return self._one.run(tokens, context).clone()
        if self._several.rows != rows:
            self._several = _Pass(self._model, self._tables, rows)
        return self._several.run(tokens, context).clone()


def build_prepacked_decoder(model: Decoder) -> PrepackedDecoder | None:
    """Return the forward pass of a dense model that is prepacked (`prepacked_linear`); None for others."""
    if not isinstance(model.packed_head, PrepackedLinear | TransposedLinear):
        return None
    dense = all(type(block) in (ParallelBlock, SequentialBlock) for block in model.blocks)
    return PrepackedDecoder(model) if dense else None
