"""Blocks of a mixture: routed feed-forward experts, and attention that is averaged or a soft mixture.

A parallel block computes

    x + sum_j g_j attention_j(norm(x)) + sum_{i in top-k} p_i feed_forward_i(norm(x)) [+ shared(norm(x))]

(arXiv 2408.08274, equations 1 to 4; arXiv 2408.15901, section 3.) A sequential block mixes the attention
experts first, and routes the feed-forward experts by what comes out. Attention experts are further heads of
one attention: their projections are one matmul, and their attention one kernel call. A gate scales each
expert's heads before the output projection, whose product with all heads is the sum over the experts.

Shape suffixes: b: batch; t: time; e: experts; k: experts of each token; d: hidden size of the model;
f: intermediate size of the dense feed-forward; a: all heads times their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from koine.model.block import Angles, AttentionFn, ParallelBlock, SequentialBlock
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.model.moe.experts import assign_top_k, feed_forward_experts
from koine.model.moe.routers import DomainRouter, LinearRouter, Routing, soft_gates


class FeedForwardExperts(nn.Module):
    """Routed experts of one block.

    `experts_in` is `[experts, 2 * intermediate, hidden]`, the gate's rows, then those of up. `experts_out` is
    `[experts, hidden, intermediate]`.
    """

    def __init__(self, config: ModelConfig, mixture: MixtureConfig) -> None:
        super().__init__()
        count, hidden, width = len(mixture.experts), config.hidden_size, config.intermediate_size
        self.top_k, self.normalise_top_k = mixture.top_k, mixture.normalise_top_k
        self.activation = config.activation
        self.experts_in = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.experts_out = nn.Parameter(torch.empty(count, hidden, width))
        self.router = (
            LinearRouter(hidden, count)
            if mixture.domain_size is None
            else DomainRouter(hidden, count, mixture.domain_size)
        )

    def forward(self, normed_btd: Tensor) -> tuple[Tensor, Routing]:
        """Return the weighted sum of each token's experts, and the routing."""
        logits_bte = _upcast(self.router(normed_btd))
        probabilities_bte = torch.softmax(logits_bte, dim=-1)
        assignments = assign_top_k(
            probabilities_bte.flatten(0, 1), self.top_k, normalise=self.normalise_top_k
        )
        out = feed_forward_experts(
            normed_btd.flatten(0, 1), self.experts_in, self.experts_out, assignments, self.activation
        )
        experts_btk = assignments.experts.view(*normed_btd.shape[:2], -1)
        return out.view_as(normed_btd), Routing(logits_bte, probabilities_bte, experts_btk, None)


class AttentionExperts(nn.Module):
    """The gates of attention experts, and their output biases, `[experts, hidden]`, where there are any."""

    def __init__(self, config: ModelConfig, mixture: MixtureConfig) -> None:
        super().__init__()
        count = len(mixture.experts)
        self.top_k, self.grouped = mixture.attention_top_k, mixture.attention == "kv-experts"
        self.kv_heads = config.kv_heads
        self.router = LinearRouter(config.hidden_size, count)
        if config.attention_out_bias:
            self.out_bias = nn.Parameter(torch.zeros(count, config.hidden_size))

    def forward(self, normed_btd: Tensor, attended_bta: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gated heads, the router's logits `[batch, time, experts]`, and the gated biases."""
        logits_bte = _upcast(self.router(normed_btd))
        gates_bte = soft_gates(logits_bte, self.top_k).to(attended_bta.dtype)
        bias = gates_bte @ self.out_bias if hasattr(self, "out_bias") else None
        return self._gate(attended_bta, gates_bte), logits_bte, bias

    def _gate(self, attended_bta: Tensor, gates_bte: Tensor) -> Tensor:
        """Multiply the heads of each attention expert by its gate."""
        if self.grouped:
            heads = torch.unflatten(attended_bta, -1, (gates_bte.shape[-1], -1))
            return (heads * gates_bte[..., None]).flatten(-2)
        # Experts that share their keys lie side by side under each key head.
        heads = torch.unflatten(attended_bta, -1, (self.kv_heads, gates_bte.shape[-1], -1))
        return (heads * gates_bte[..., None, :, None]).flatten(-3)


class ParallelMixtureBlock(ParallelBlock):
    """A parallel block whose feed-forward, and perhaps whose attention, is a mixture of experts."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, mixture: MixtureConfig) -> None:
        super().__init__(config, spec)
        self.experts = FeedForwardExperts(config, mixture)
        self.attention_experts = (
            None if mixture.attention == "averaged" else AttentionExperts(config, mixture)
        )
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if mixture.shared_gate else None

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the block's output, see `ParallelBlock`, and the routing of the tokens of `x`."""
        normed_btd = self.norm(x)
        attended_bta, dense_hidden_btf = self.branches(normed_btd, angles, document_starts, attention)
        if self.shared_gate is not None:
            dense_hidden_btf = dense_hidden_btf * torch.sigmoid(self.shared_gate(normed_btd))
        attention_logits_bte = bias_btd = None
        if self.attention_experts is not None:
            attended_bta, attention_logits_bte, bias_btd = self.attention_experts(normed_btd, attended_bta)
        out_btd = self.out_proj(torch.cat((attended_bta, dense_hidden_btf), dim=-1))
        if bias_btd is not None:
            out_btd = out_btd + bias_btd
        expert_out_btd, routing = self.experts(normed_btd)
        x = self.add(self.add(x, out_btd), expert_out_btd)
        return x, routing._replace(attention_logits=attention_logits_bte)


class SequentialMixtureBlock(SequentialBlock):
    """A sequential block whose feed-forward, and perhaps whose attention, is a mixture of experts."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, mixture: MixtureConfig) -> None:
        super().__init__(config, spec)
        self.experts = FeedForwardExperts(config, mixture)
        self.attention_experts = (
            None if mixture.attention == "averaged" else AttentionExperts(config, mixture)
        )
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if mixture.shared_gate else None

    def forward(
        self,
        x: Tensor,
        angles: Angles | None,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the block's output, see `SequentialBlock`, and the routing of the tokens of `x`."""
        normed_btd = self.attention_norm(x)
        attended_bta = self.attend(self.qkv_proj(normed_btd), angles, document_starts, attention)
        attention_logits_bte = bias_btd = None
        if self.attention_experts is not None:
            attended_bta, attention_logits_bte, bias_btd = self.attention_experts(normed_btd, attended_bta)
        out_btd = self.o_proj(attended_bta)
        if bias_btd is not None:
            out_btd = out_btd + bias_btd
        x = self.add(x, self.attention_out_norm(out_btd))
        normed_btd = self.feed_forward_norm(x)
        out_btd, routing = self.experts(normed_btd)
        if self.config.dense_size:
            shared_btd = self.feed_forward(normed_btd)
            if self.shared_gate is not None:
                shared_btd = torch.sigmoid(self.shared_gate(normed_btd)) * shared_btd
            out_btd = out_btd + shared_btd
        x = self.add(x, self.feed_forward_out_norm(out_btd))
        return x, routing._replace(attention_logits=attention_logits_bte)


def _upcast(logits: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
