"""Attention of question and answer: mass by segment, and entropy (arXiv 2501.18795).

Rows are the positions `i` of question and answer ("qc"); keys fall into four segments. Per layer `l` and head
`h`

    mass[l, h, segment] = mean over rows i of  sum over keys j in segment of  a[l, h, i, j]    (the four sum
    to 1) entropy_of_rows     = mean over rows i of  H(a[l, h, i]),         H(p) = -sum p log2 p     (bits)
    entropy_of_mean_row = H(mean over rows i of a[l, h, i])                                    (bits)

The paper's "aggregated entropy" can be read as either, so both are given. Only the wanted rows are computed:
memory grows with `heads * rows * time`, never with `time ** 2`.

Shape suffixes: n layers, h query heads, k KV heads, r rows (queries), t keys, d head size, s the four
segments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model import CausalLM, Decoder, LanguageModel, LayerSpec
from koine.model.block import Angles, Block, rope_angles

if TYPE_CHECKING:
    from koine.evaluate.long_context.prompts import Prompt

SEGMENTS = ("begin", "needle", "context", "question")
"""`begin`: first tokens; `needle`: facts for the answer; `question`: it and its answer; `context`: rest."""
BEGIN_TOKENS = 10
"""Number of tokens of the beginning (the sink) in the paper."""
# Float32 values of the attention weights that are in memory at once (128 MiB).
_WEIGHTS = 32 * 1024 * 1024


@dataclass(frozen=True)
class Attention:
    """Masses and entropies (bits) of one prompt's rows; every field can be averaged over prompts.

    Attributes:
        mass: `[layers, heads, 4]`, segments in the order of `SEGMENTS`.
        entropy_of_rows: `[layers, heads]`.
        entropy_of_mean_row: `[layers, heads]`.
        entropy_of_layer_mean_row: `[layers]`, of the row averaged over rows and heads.
        entropy_of_total_mean_row: `[]`, of the row averaged over rows, heads and layers.
    """

    mass: Tensor
    entropy_of_rows: Tensor
    entropy_of_mean_row: Tensor
    entropy_of_layer_mean_row: Tensor
    entropy_of_total_mean_row: Tensor


def layer_kind(spec: LayerSpec) -> str:
    """Return `full NoPE`, `full RoPE`, `sliding RoPE` or `sliding NoPE`."""
    return f"{'full' if spec.window is None else 'sliding'} {'RoPE' if spec.rope else 'NoPE'}"


def layer_kinds(model: LanguageModel) -> list[str]:
    """Return the kind of each layer; for a model of `transformers` only whether it has a window."""
    if isinstance(model, Decoder):
        return [layer_kind(spec) for spec in model.config.layers]
    assert isinstance(model, CausalLM)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [str(kind).removesuffix("_attention") for kind in kinds]


def segment_ids(
    time: int, *, needles: Sequence[tuple[int, int]], question_start: int, begin: int = BEGIN_TOKENS
) -> Tensor:
    """Return the segment of each of `time` keys as an index into `SEGMENTS`, `[time]`.

    needles: half-open token spans; they win over the first `begin` tokens.
    question_start: position of the question; everything from there on is `question`.
    """
    if not 0 < question_start < time:
        raise UserError(
            f"the question starts at token {question_start} of {time}", hint="it must follow a context"
        )
    ids = torch.full((time,), SEGMENTS.index("context"), dtype=torch.long)
    ids[:begin] = SEGMENTS.index("begin")
    for start, end in needles:
        ids[start:end] = SEGMENTS.index("needle")
    ids[question_start:] = SEGMENTS.index("question")
    return ids


def block_attention(block: Block, x: Tensor, rows: slice) -> Tensor:
    """Compute the attention weights of some rows of a block from the block's input.

    x: `[1, time, hidden]`, one document without padding. rows: the queries, a slice of positions.
    Returns `[heads, rows, time]` in float32; every row sums to 1.
    """
    keys = _keys(block, x)
    start, stop, _ = rows.indices(x.shape[1])
    return _weights(block, _queries(block, x, start, stop), keys, start)


def _keys(block: Block, x: Tensor) -> Tensor:
    """Compute rotated keys `[kv_heads, time, head_dim]`."""
    _, k, _ = block.heads(block.qkv(x), _angles(block, 0, x.shape[1], x.device))
    return k[0].transpose(0, 1)


def _queries(block: Block, x: Tensor, start: int, stop: int) -> Tensor:
    """Compute rotated and scaled queries `[heads, stop - start, head_dim]`."""
    q, _, _ = block.heads(block.qkv(x[:, start:stop]), _angles(block, start, stop, x.device))
    return q[0].flatten(1, 2).transpose(0, 1)


def _angles(block: Block, start: int, stop: int, device: torch.device) -> Angles | None:
    if block.rope is None:
        return None
    return rope_angles(torch.arange(start, stop, device=device)[None], block.config)[block.rope]


def _weights(block: Block, q_hrd: Tensor, keys_ktd: Tensor, start: int) -> Tensor:
    """Compute the softmax of the visible scores.

    q_hrd: queries of the positions from `start` on. keys_ktd: all keys.
    """
    config, window = block.config, block.spec.window
    rows, time, device = q_hrd.shape[1], keys_ktd.shape[1], q_hrd.device
    # The query heads of a group share a KV head: one matmul for each KV head.
    grouped = q_hrd.reshape(config.kv_heads, config.groups * rows, config.head_dim)
    scores = torch.bmm(grouped.float(), keys_ktd.float().transpose(1, 2))
    scores_hrt = scores.view(config.query_heads, rows, time)
    distance_rt = (
        torch.arange(start, start + rows, device=device)[:, None] - torch.arange(time, device=device)[None]
    )
    masked_rt = distance_rt < 0
    if window is not None:
        masked_rt |= distance_rt >= window
    weights_hrt: Tensor = scores_hrt.masked_fill_(masked_rt, float("-inf")).softmax(dim=-1)
    return weights_hrt


def entropy_bits(p: Tensor) -> Tensor:
    """Compute `-sum p log2 p` over the last dimension; `[..., n]` to `[...]`."""
    nats: Tensor = torch.special.entr(p)
    return nats.sum(dim=-1) / math.log(2.0)


@dataclass(frozen=True)
class _Layer:
    mass: Tensor  # [heads, 4]
    entropy: Tensor  # [heads]
    mean_row: Tensor  # [heads, time]


def _summary(parts: Iterator[Tensor], segments: Tensor) -> _Layer:
    """Average over parts of the rows, `[heads, rows, time]` each."""
    rows = 0
    total: Tensor | None = None
    entropy: Tensor | None = None
    for weights in parts:
        rows += weights.shape[1]
        summed, bits = weights.sum(dim=1), entropy_bits(weights).sum(dim=1)
        total = summed if total is None else total + summed
        entropy = bits if entropy is None else entropy + bits
    assert total is not None
    assert entropy is not None
    mean = total / rows
    mass = mean.new_zeros(mean.shape[0], len(SEGMENTS)).index_add_(1, segments.to(mean.device), mean)
    return _Layer(mass.cpu(), (entropy / rows).cpu(), mean.cpu())


def attention_of(
    model: LanguageModel, tokens: Sequence[int], segments: Tensor, *, rows: slice | None = None
) -> Attention:
    """Measure attention masses and entropies of one prompt with its answer.

    Args:
        model: our decoder, or a causal LM of `transformers`.
        tokens: ids of the whole text, BOS first.
        segments: `[time]`, as `segment_ids` returns them.
        rows: the queries; `None`: those whose own segment is `question`.

    Raises:
        UserError: for a model that returns no attention weights.
    """
    if len(segments) != len(tokens):
        raise UserError(f"{len(tokens)} tokens and {len(segments)} segments", hint="give one segment a token")
    if rows is None:
        rows = slice(
            int((segments == SEGMENTS.index("question")).nonzero()[0, 0]),
            len(tokens),
        )
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            layers = (
                _of_decoder(model, tokens, segments, rows)
                if isinstance(model, Decoder)
                else _of_transformers(model, tokens, segments, rows)
            )
    finally:
        model.train(training)
    mean_rows = torch.stack([layer.mean_row.mean(dim=0) for layer in layers])
    return Attention(
        mass=torch.stack([layer.mass for layer in layers]),
        entropy_of_rows=torch.stack([layer.entropy for layer in layers]),
        entropy_of_mean_row=torch.stack([entropy_bits(layer.mean_row) for layer in layers]),
        entropy_of_layer_mean_row=entropy_bits(mean_rows),
        entropy_of_total_mean_row=entropy_bits(mean_rows.mean(dim=0)),
    )


def _of_decoder(model: Decoder, tokens: Sequence[int], segments: Tensor, rows: slice) -> list[_Layer]:
    """Measure each block when its input arrives: one layer's weights at a time."""
    layers: list[_Layer] = []
    start, stop, _ = rows.indices(len(tokens))

    def measure(block: Block, x: Tensor) -> None:
        keys = _keys(block, x)
        size = max(1, _WEIGHTS // (block.config.query_heads * len(tokens)))
        parts = (
            _weights(block, _queries(block, x, first, min(first + size, stop)), keys, first)
            for first in range(start, stop, size)
        )
        layers.append(_summary(parts, segments))

    with _before_each_block(model, measure):
        model(torch.tensor([list(tokens)], device=model.output_weight.device))
    return layers


@contextmanager
def _before_each_block(model: Decoder, measure: Callable[[Block, Tensor], None]) -> Iterator[None]:
    """Call `measure` with each block and its input during a forward."""

    def hook(block: Any, inputs: tuple[Any, ...]) -> None:
        measure(block, inputs[0])

    handles = [block.register_forward_pre_hook(hook) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_transformers(
    model: LanguageModel, tokens: Sequence[int], segments: Tensor, rows: slice
) -> list[_Layer]:
    """Measure the weights that `transformers` returns: whole `[time, time]` matrices."""
    assert isinstance(model, CausalLM)
    inner = model.inner
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")  # fused kernels return no weights
    try:
        device = next(inner.parameters()).device
        out = inner.base_model(
            torch.tensor([list(tokens)], device=device), output_attentions=True, use_cache=False
        )
    finally:
        inner.set_attn_implementation(before)
    found = getattr(out, "attentions", None)
    if not found or any(weights is None or weights.dim() != 4 for weights in found):
        raise UserError(
            f"{type(inner).__name__} gives no attention weights", hint="measure it without attention"
        )
    return [_summary(iter([weights[0, :, rows].float()]), segments) for weights in found]


def attention_of_prompts(
    model: LanguageModel, prompts: Sequence[Prompt], *, begin: int = BEGIN_TOKENS
) -> Attention:
    """Average `attention_of` over prompts with their right answers; rows are question and answer."""
    found = []
    for prompt in prompts:
        tokens = (*prompt.tokens, *prompt.answer)
        segments = segment_ids(
            len(tokens), needles=prompt.needles, question_start=prompt.question[0], begin=begin
        )
        found.append(attention_of(model, tokens, segments))
    return Attention(
        **{
            field.name: torch.stack([getattr(one, field.name) for one in found]).mean(dim=0)
            for field in fields(Attention)
        }
    )


def describe(model: LanguageModel, attention: Attention, *, prompts: int) -> dict[str, Any]:
    """Return `attention` as JSON: over all layers, by kind of layer, by layer and by head.

    `{"prompts", "overall": {"mass": {segment: share}, "entropy_of_rows", "entropy_of_mean_row"}, "kinds":
    {kind: {..., "layers": count}}, "layers": [{"kind", ..., "heads": [{...}]}]}`, entropies in bits. The
    `entropy_of_mean_row` of a layer is that of the row averaged over rows and heads. In `kinds` it is the
    mean over the layers of a kind, in `overall` that of the row averaged over layers too.
    """
    kinds = layer_kinds(model)
    layers = [
        {
            "kind": kind,
            **_entry(
                attention.mass[index].mean(dim=0),
                attention.entropy_of_rows[index].mean(),
                attention.entropy_of_layer_mean_row[index],
            ),
            "heads": [
                _entry(mass, rows, mean_row)
                for mass, rows, mean_row in zip(
                    attention.mass[index],
                    attention.entropy_of_rows[index],
                    attention.entropy_of_mean_row[index],
                    strict=True,
                )
            ],
        }
        for index, kind in enumerate(kinds)
    ]
    by_kind = {}
    for kind in dict.fromkeys(kinds):
        chosen = torch.tensor([index for index, one in enumerate(kinds) if one == kind])
        by_kind[kind] = {
            "layers": len(chosen),
            **_entry(
                attention.mass[chosen].mean(dim=(0, 1)),
                attention.entropy_of_rows[chosen].mean(),
                attention.entropy_of_layer_mean_row[chosen].mean(),
            ),
        }
    overall = _entry(
        attention.mass.mean(dim=(0, 1)),
        attention.entropy_of_rows.mean(),
        attention.entropy_of_total_mean_row,
    )
    return {"prompts": prompts, "overall": overall, "kinds": by_kind, "layers": layers}


def _entry(mass: Tensor, rows: Tensor, mean_row: Tensor) -> dict[str, Any]:
    return {
        "mass": dict(zip(SEGMENTS, mass.tolist(), strict=True)),
        "entropy_of_rows": float(rows),
        "entropy_of_mean_row": float(mean_row),
    }
