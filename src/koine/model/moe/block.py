"""The decoder's block with experts: routed feed-forward halves, and attention that is averaged or a soft mixture of experts.

    x + sum_j g_j attention_j(norm(x)) + sum_{i in top-k} p_i feed_forward_i(norm(x)) [+ shared(norm(x))]

(arXiv 2408.08274, equations 1 to 4; arXiv 2408.15901, section 3.) Attention experts lie side by side as more heads of one attention: their
projections are one matmul and their attention one kernel call; a gate scales each expert's heads before the output projection, whose
product with all heads is the sum over the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from koine.model.block import Angles, AttentionFn, Block
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.model.moe.experts import choose, feed_forward_experts
from koine.model.moe.routers import DomainRouter, LinearRouter, Routing, soft_gates


class MixtureBlock(Block):
    """A block whose feed-forward half, and perhaps whose attention, is chosen for each token.

    `experts_in` is `[experts, 2 * intermediate, hidden]` (gate rows, then up), `experts_out` `[experts, hidden, intermediate]`.
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
        """See `Block`; and how the tokens of `x` were routed."""
        normed = self.norm(x)
        mixed, gated = self.branches(normed, angles, document_starts, attention)
        attention_logits = None
        if self.mixture.attention != "averaged":
            attention_logits = _wide(self.attention_router(normed))
            mixed = self._gate(mixed, soft_gates(attention_logits, self.mixture.attention_top_k))
        written = self.out_proj(torch.cat((mixed, gated), dim=-1))
        logits = _wide(self.router(normed))
        probabilities = torch.softmax(logits, dim=-1)
        chosen = choose(probabilities.flatten(0, 1), self.mixture.top_k)
        routed = feed_forward_experts(normed.flatten(0, 1), self.experts_in, self.experts_out, chosen)
        out = x + written + routed.view_as(x)
        return out, Routing(logits, probabilities, chosen.experts.view(*x.shape[:2], -1), attention_logits)

    def _gate(self, mixed: Tensor, gates: Tensor) -> Tensor:
        """`mixed` `[batch, time, heads * head_dim]` with each expert's heads times its gate `[batch, time, experts]`."""
        gates = gates.to(mixed.dtype)
        if self.mixture.attention == "kv-experts":
            heads = torch.unflatten(mixed, -1, (gates.shape[-1], -1))
            return (heads * gates[..., None]).flatten(-2)
        # Experts that share their keys lie side by side under each key head.
        heads = torch.unflatten(mixed, -1, (self.config.kv_heads, gates.shape[-1], -1))
        return (heads * gates[..., None, :, None]).flatten(-3)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
