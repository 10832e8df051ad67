"""Where attention goes: its mass on segments of a prompt, and its entropy, layer by layer (arXiv 2501.18795, Metrics).

For the rows of the question and the completion ("qc"), the mass on a segment is the sum of the attention weights on its keys, averaged over
heads and rows; segments that cover all keys sum to 1. Entropy is in bits. The paper does not say whether it averages the entropies of
rows or takes the entropy of the averaged row: both are here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from koine.model.config import LayerSpec
from koine.model.decoder import Block, Decoder, angles_of

Kind = Literal["full, no positions", "full, RoPE", "window, RoPE", "window, no positions"]

ROWS = 32
"""Query rows whose weights over all keys stand in memory at once."""


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's rows look at, averaged over heads.

    mass: segment to share. entropy_of_rows: mean over rows and heads of each row's entropy, bits. entropy_of_mean: entropy of the row averaged
    over rows and heads, bits.
    """

    layer: int
    kind: Kind
    mass: Mapping[str, float]
    entropy_of_rows: float
    entropy_of_mean: float


def kind_of(spec: LayerSpec) -> Kind:
    """How a layer looks back and knows positions, in words."""
    if spec.window is None:
        return "full, RoPE" if spec.rope else "full, no positions"
    return "window, RoPE" if spec.rope else "window, no positions"


def attention_weights(block: Block, x: Tensor, rows: Tensor) -> Tensor:
    """The attention weights of some rows of one layer, `[heads, rows, time]` float32, zero where a key is hidden.

    x: `[1, time, hidden]`, the layer's input. rows: `[rows]`, positions of the queries.
    """
    time = x.shape[1]
    positions = torch.arange(time, device=x.device)
    q, k, _, _ = block.project(x, angles_of(positions[None], block.config))
    scores = torch.einsum("rkgd,tkd->kgrt", q[0, rows].float(), k[0].float()).flatten(0, 1)
    hidden = positions[None, :] > rows[:, None]
    if block.spec.window is not None:
        hidden |= positions[None, :] <= rows[:, None] - block.spec.window
    weights: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights


def entropy_bits(weights: Tensor) -> Tensor:
    """Entropy of each distribution `[..., keys]` in bits; `0 * log 0` counts as 0."""
    nats: Tensor = torch.special.entr(weights).sum(dim=-1)
    return nats / math.log(2.0)


@torch.no_grad()
def attention_of(
    model: Decoder, tokens: Tensor, rows: Iterable[int], segments: Mapping[str, Sequence[int]]
) -> list[LayerAttention]:
    """Mass on each segment and entropy, layer by layer, of the rows given.

    tokens: `[1, time]`. rows: positions of the queries (question and completion). segments: name to positions of its keys; what is in none of them
    counts as "context". The hidden states of all positions are computed once, the weights of `ROWS` rows at a time, so no `time * time` matrix exists.
    """
    inputs: list[Tensor] = []
    model(tokens, block_outputs=inputs)
    time, queries = tokens.shape[1], torch.tensor(sorted(rows), device=tokens.device)
    label = torch.zeros(time, dtype=torch.long, device=tokens.device)
    names = ["context", *segments]
    for number, places in enumerate(segments.values(), start=1):
        label[torch.tensor(list(places), dtype=torch.long, device=tokens.device)] = number
    found = []
    for layer, (block, x) in enumerate(zip(model.blocks, inputs, strict=False)):
        assert isinstance(block, Block)
        total = torch.zeros(time, device=tokens.device)
        entropy = torch.zeros((), device=tokens.device)
        for part in torch.split(queries, ROWS):
            weights = attention_weights(block, x, part)
            total += weights.sum(dim=(0, 1))
            entropy += entropy_bits(weights).sum()
        count = len(queries) * model.config.num_heads
        mean = total / count
        mass = torch.zeros(len(names), device=tokens.device).index_add_(0, label, mean)
        found.append(
            LayerAttention(
                layer,
                kind_of(block.spec),
                dict(zip(names, mass.tolist(), strict=True)),
                float(entropy) / count,
                float(entropy_bits(mean)),
            )
        )
    return found
