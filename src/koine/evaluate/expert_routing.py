"""Where a mixture of experts sends the tokens of each domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model import Decoder
from koine.model.moe.routers import Routing
from koine.tokenizer import Tokenizer


@dataclass(frozen=True)
class RoutingShares:
    """Means over the tokens of a domain, a row a layer and a column an expert.

    probability: `[layers, experts]`, the router's probability (arXiv 2408.15901, section 5.3).
    chosen: `[layers, experts]`, the share of choices that fall on the expert; rows sum to 1.
    attention: `[layers, experts]`, the soft gate of attention experts; `None` where the attention is averaged.
    tokens: how many were counted.
    """

    experts: tuple[str, ...]
    probability: Tensor
    chosen: Tensor
    attention: Tensor | None
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Lists, and the means over the layers by expert."""
        return {
            "tokens": self.tokens,
            "probability": dict(zip(self.experts, self.probability.mean(0).tolist(), strict=True)),
            "chosen": dict(zip(self.experts, self.chosen.mean(0).tolist(), strict=True)),
            "attention": None
            if self.attention is None
            else dict(zip(self.experts, self.attention.mean(0).tolist(), strict=True)),
            "layers": {
                "probability": self.probability.tolist(),
                "chosen": self.chosen.tolist(),
                "attention": None if self.attention is None else self.attention.tolist(),
            },
        }


@torch.inference_mode()
def routing_shares(
    model: Decoder, tokenizer: Tokenizer, texts: Iterable[str], *, max_tokens: int = 512
) -> RoutingShares:
    """How the tokens of `texts`, each cut to `max_tokens`, are routed.

    Raises `UserError` for a dense model, and where there is no text.
    """
    mixture = model.config.mixture
    if mixture is None:
        raise UserError("the model is dense: it routes nothing", hint="give a mixture: see `koine upcycle`")
    device = model.embedding.weight.device
    count, layers = len(mixture.experts), len(model.config.layers)
    probability = torch.zeros(layers, count, dtype=torch.float64)
    chosen, attention = torch.zeros_like(probability), torch.zeros_like(probability)
    total = 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)][:max_tokens]
        routings: list[Routing] = []
        model(torch.tensor([ids], device=device), routings=routings)
        total += len(ids)
        for layer, routing in enumerate(routings):
            probability[layer] += routing.probabilities.sum(dim=(0, 1)).double().cpu()
            picks = torch.bincount(routing.experts.flatten(), minlength=count).double().cpu()
            chosen[layer] += picks / mixture.top_k
            if routing.attention_logits is not None:
                attention[layer] += routing.attention_logits.softmax(-1).sum(dim=(0, 1)).double().cpu()
    if not total:
        raise UserError("there is no text to route", hint="give at least one document")
    return RoutingShares(
        mixture.experts,
        probability / total,
        chosen / total,
        None if mixture.attention == "averaged" else attention / total,
        total,
    )


def routing_blocks(shares: Mapping[str, RoutingShares]) -> list[dict[str, Any]]:
    """Heat maps for a report: domains by experts for each kind of router, and layers by experts for each domain."""
    first = next(iter(shares.values()))
    experts = list(first.experts)

    def heat_map(title: str, rows: list[str], values: list[list[float]]) -> dict[str, Any]:
        return {
            "kind": "heatmap",
            "title": title,
            "label": "share",
            "rows": rows,
            "columns": experts,
            "values": values,
        }

    blocks = [
        heat_map(
            "Tokens by domain and feed-forward expert",
            list(shares),
            [one.chosen.mean(0).tolist() for one in shares.values()],
        ),
        heat_map(
            "Router's probability by domain and feed-forward expert",
            list(shares),
            [one.probability.mean(0).tolist() for one in shares.values()],
        ),
    ]
    if first.attention is not None:
        found = [one.attention.mean(0).tolist() for one in shares.values() if one.attention is not None]
        blocks.append(heat_map("Gate by domain and attention expert", list(shares), found))
    layers = [f"layer {number}" for number in range(len(first.chosen))]
    blocks += [
        heat_map(f"Tokens of {name} by layer and feed-forward expert", layers, one.chosen.tolist())
        for name, one in shares.items()
    ]
    return blocks
