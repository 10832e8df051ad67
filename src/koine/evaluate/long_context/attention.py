"""Where a model looks when it answers: attention mass by segment, and attention entropy (arXiv 2501.18795).

Rows are the positions `i` of the question and the answer ("qc"); keys fall into four segments. Per layer `l` and head `h`

    mass[l, h, segment] = mean over rows i of  sum over keys j in segment of  a[l, h, i, j]            (the four sum to 1)
    entropy_of_rows     = mean over rows i of  H(a[l, h, i]),         H(p) = -sum p log2 p             (bits)
    entropy_of_mean_row = H(mean over rows i of a[l, h, i])                                            (bits)

The paper's "aggregated entropy" can be read as either, so both are given. Only the rows asked for are computed: memory grows
with `heads * rows * time`, never with `time ** 2`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from koine.errors import UserError
from koine.model import CausalLM, Decoder, LanguageModel, LayerSpec
from koine.model.attention.rope import Rotation, apply_rotary, rotation
from koine.model.block import Block

if TYPE_CHECKING:
    from koine.evaluate.long_context.prompts import Prompt

SEGMENTS = ("begin", "needle", "context", "question")
"""`begin`: the first tokens; `needle`: the inserted facts that the answer needs; `question`: question and answer; `context`: the rest."""
BEGIN_TOKENS = 10
"""What the paper calls the beginning (the sink)."""
# Weights that are in memory at once: about this many float32 values (128 MiB).
_WEIGHTS = 32 * 1024 * 1024


@dataclass(frozen=True)
class Attention:
    """What the rows of one prompt attend to; plain averages of several prompts make sense for every field.

    mass: `[layers, heads, 4]`, segments in the order of `SEGMENTS`.
    entropy_of_rows, entropy_of_mean_row: `[layers, heads]`, bits.
    entropy_of_layer_mean_row: `[layers]`, bits of the row averaged over rows and heads.
    entropy_of_total_mean_row: `[]`, bits of the row averaged over rows, heads and layers.
    """

    mass: Tensor
    entropy_of_rows: Tensor
    entropy_of_mean_row: Tensor
    entropy_of_layer_mean_row: Tensor
    entropy_of_total_mean_row: Tensor


def layer_kind(spec: LayerSpec) -> str:
    """`full NoPE`, `full RoPE`, `sliding RoPE` or `sliding NoPE`."""
    return f"{'full' if spec.window is None else 'sliding'} {'RoPE' if spec.rope else 'NoPE'}"


def layer_kinds(model: LanguageModel) -> list[str]:
    """The kind of each layer; of another causal LM only what its configuration tells of windows."""
    if isinstance(model, Decoder):
        return [layer_kind(spec) for spec in model.config.layers]
    assert isinstance(model, CausalLM)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    return [str(kind).removesuffix("_attention") for kind in kinds]


def segment_ids(
    time: int, *, needles: Sequence[tuple[int, int]], question_start: int, begin: int = BEGIN_TOKENS
) -> Tensor:
    """The segment of each of `time` keys as an index into `SEGMENTS`, `[time]`.

    needles: half-open token spans. question_start: where the question begins; all from there on is `question`. A token of a needle
    counts as needle even where it stands among the first `begin` tokens.
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
    """The attention weights of some rows of a block, from the block's input.

    x: `[1, time, hidden]`, one document without padding. rows: the queries, a slice of positions.
    Returns `[heads, rows, time]`, float32; every row sums to 1.
    """
    keys = _keys(block, x)
    start, stop, _ = rows.indices(x.shape[1])
    return _weights(block, _queries(block, x, start, stop), keys, start)


def _keys(block: Block, x: Tensor) -> Tensor:
    """Rotated keys `[kv_heads, time, head_dim]`."""
    config, spec = block.config, block.spec
    first = config.attention_size
    weight = block.in_proj.weight[first : first + config.kv_size]
    k: Tensor = F.linear(block.norm(x), weight).view(1, -1, config.kv_heads, config.head_dim)
    if spec.qk_norm:
        k = block.k_norm(k)
    if spec.rope:
        k = apply_rotary(k, _angles(block, 0, x.shape[1], x.device))
    return k[0].transpose(0, 1)


def _queries(block: Block, x: Tensor, start: int, stop: int) -> Tensor:
    """Rotated and scaled queries `[heads, stop - start, head_dim]`."""
    config, spec = block.config, block.spec
    weight = block.in_proj.weight[: config.attention_size]
    q: Tensor = F.linear(block.norm(x[:, start:stop]), weight)
    q = q.view(1, -1, config.query_heads, config.head_dim)
    if spec.qk_norm:
        q = block.q_norm(q)
    if spec.rope:
        q = apply_rotary(q, _angles(block, start, stop, x.device))
    scaled: Tensor = q[0].transpose(0, 1) * config.head_dim**-0.5
    return scaled


def _angles(block: Block, start: int, stop: int, device: torch.device) -> Rotation:
    positions = torch.arange(start, stop, device=device)[None]
    return rotation(positions, block.config.head_dim, block.config.rope_theta).view_as_heads()


def _weights(block: Block, q: Tensor, keys: Tensor, start: int) -> Tensor:
    """Softmax of the visible scores; q `[heads, rows, head_dim]` are the positions from `start` on."""
    config, window = block.config, block.spec.window
    rows, time = q.shape[1], keys.shape[1]
    grouped = q.reshape(config.kv_heads, config.groups * rows, config.head_dim)
    scores = torch.bmm(grouped.float(), keys.float().transpose(1, 2))
    scores = scores.view(config.query_heads, rows, time)
    distance = (
        torch.arange(start, start + rows, device=q.device)[:, None]
        - torch.arange(time, device=q.device)[None]
    )
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    weights: Tensor = scores.masked_fill_(hidden, float("-inf")).softmax(dim=-1)
    return weights


def entropy_bits(p: Tensor) -> Tensor:
    """`-sum p log2 p` over the last dimension; `[..., n]` to `[...]`."""
    nats: Tensor = torch.special.entr(p)
    return nats.sum(dim=-1) / math.log(2.0)


@dataclass(frozen=True)
class _Layer:
    mass: Tensor  # [heads, 4]
    entropy: Tensor  # [heads]
    mean_row: Tensor  # [heads, time]


def _summary(parts: Iterator[Tensor], segments: Tensor) -> _Layer:
    """Sums over parts of the rows (`[heads, rows, time]` each), divided by their number."""
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
    """Attention masses and entropies of one prompt with its answer.

    tokens: ids of the whole text, BOS first. segments: `[time]`, as `segment_ids` gives them. rows: the queries; None: those whose own
    segment is `question`.
    Raises `UserError` for a model that shows no attention weights.
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
    """Each block is looked at as its input comes by: one layer's weights at a time."""
    layers: list[_Layer] = []
    start, stop, _ = rows.indices(len(tokens))

    def look(block: Block, x: Tensor) -> None:
        keys = _keys(block, x)
        size = max(1, _WEIGHTS // (block.config.query_heads * len(tokens)))
        parts = (
            _weights(block, _queries(block, x, first, min(first + size, stop)), keys, first)
            for first in range(start, stop, size)
        )
        layers.append(_summary(parts, segments))

    with _before_each_block(model, look):
        model(torch.tensor([list(tokens)], device=model.output_weight.device))
    return layers


@contextmanager
def _before_each_block(model: Decoder, look: Callable[[Block, Tensor], None]) -> Iterator[None]:
    def hook(block: Any, inputs: tuple[Any, ...]) -> None:
        look(block, inputs[0])

    handles = [block.register_forward_pre_hook(hook) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_transformers(
    model: LanguageModel, tokens: Sequence[int], segments: Tensor, rows: slice
) -> list[_Layer]:
    """The weights that `transformers` gives itself: whole `[time, time]` matrices, so for moderate lengths."""
    assert isinstance(model, CausalLM)
    inner = model.inner
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")  # the fused kernels keep no weights
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
    """The mean of `attention_of` over prompts with their right answers; rows are those of question and answer."""
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
    """`attention` as JSON: over all layers, by kind of layer, by layer and by head.

    `{"prompts", "overall": {"mass": {segment: share}, "entropy_of_rows", "entropy_of_mean_row"}, "kinds": {kind: {..., "layers": count}},
    "layers": [{"kind", ..., "heads": [{...}]}]}`, entropies in bits. In `overall`, `kinds` and `layers`, `entropy_of_mean_row` is that of the
    row averaged over heads too, and in `overall` over layers too; in `kinds` it is the mean over its layers.
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
