"""Block of a mixture: routed feed-forward experts, and attention that is averaged or a soft mixture.

    x + sum_j g_j attention_j(norm(x)) + sum_{i in top-k} p_i feed_forward_i(norm(x)) [+ shared(norm(x))]

(arXiv 2408.08274, equations 1 to 4; arXiv 2408.15901, section 3.) Attention experts are further heads of one
attention: their projections are one matmul, and their attention one kernel call. A gate scales each expert's
heads before the output projection, whose product with all heads is the sum over the experts.

Shape suffixes: b: batch; t: time; e: experts; k: experts of each token; d: hidden size of the model;
f: intermediate size of the dense feed-forward; a: all heads times their size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from koine.model.block import Angles, AttentionFn, Block
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.model.moe.experts import assign_top_k, feed_forward_experts
from koine.model.moe.routers import DomainRouter, LinearRouter, Routing, soft_gates


class MixtureBlock(Block):
    """A block whose feed-forward, and perhaps whose attention, is a mixture of experts.

    `experts_in` is `[experts, 2 * intermediate, hidden]`, the gate's rows, then those of up. `experts_out` is
    `[experts, hidden, intermediate]`.
    """

    def __init__(self, config: ModelConfig, spec: LayerSpec, mixture: MixtureConfig) -> None:
        super().__init__(config, spec)
        self.mixture = mixture
        count, hidden, width = len(mixture.experts), config.hidden_size, config.intermediate_size
        self.experts_in = nn.Parameter(torch.empty(count, 2 * width, hidden))
        self.experts_out = nn.Parameter(torch.empty(count, hidden, width))
        self.router = (
            LinearRouter(hidden, count)
            if mixture.domain_size is None
            else DomainRouter(hidden, count, mixture.domain_size)
        )
        if mixture.attention != "averaged":
            self.attention_router = LinearRouter(hidden, count)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        document_starts: Tensor | None = None,
        attention: AttentionFn | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the block's output, see `Block`, and the routing of the tokens of `x`."""
        normed_btd = self.norm(x)
        attended_bta, dense_hidden_btf = self.branches(normed_btd, angles, document_starts, attention)
        attention_logits_bte = None
        if self.mixture.attention != "averaged":
            attention_logits_bte = _upcast(self.attention_router(normed_btd))
            gates_bte = soft_gates(attention_logits_bte, self.mixture.attention_top_k)
            attended_bta = self._gate(attended_bta, gates_bte)
        dense_out_btd = self.out_proj(torch.cat((attended_bta, dense_hidden_btf), dim=-1))
        logits_bte = _upcast(self.router(normed_btd))
        probabilities_bte = torch.softmax(logits_bte, dim=-1)
        assignments = assign_top_k(probabilities_bte.flatten(0, 1), self.mixture.top_k)
        expert_out = feed_forward_experts(
            normed_btd.flatten(0, 1), self.experts_in, self.experts_out, assignments
        )
        experts_btk = assignments.experts.view(*x.shape[:2], -1)
        routing = Routing(logits_bte, probabilities_bte, experts_btk, attention_logits_bte)
        return x + dense_out_btd + expert_out.view_as(x), routing

    def _gate(self, attended_bta: Tensor, gates_bte: Tensor) -> Tensor:
        """Multiply the heads of each attention expert by its gate."""
        gates_bte = gates_bte.to(attended_bta.dtype)
        if self.mixture.attention == "kv-experts":
            heads = torch.unflatten(attended_bta, -1, (gates_bte.shape[-1], -1))
            return (heads * gates_bte[..., None]).flatten(-2)
        # Experts that share their keys lie side by side under each key head.
        heads = torch.unflatten(attended_bta, -1, (self.config.kv_heads, gates_bte.shape[-1], -1))
        return (heads * gates_bte[..., None, :, None]).flatten(-3)


def _upcast(logits: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
