"""Expert routing: the shares of a domain's tokens that a mixture of experts sends to each expert.

Shape suffixes: l layers, e experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from koine.errors import UserError
from koine.evaluate.evaluation import Block, EvaluationSetup
from koine.model import Decoder, LanguageModel
from koine.model.moe.routers import Routing
from koine.tokenizer import Tokenizer


@dataclass(frozen=True)
class RoutingShares:
    """Means over the tokens of a domain, `[layers, experts]` each.

    probability: the router's probability (arXiv 2408.15901, section 5.3).
    chosen: share of the expert assignments; rows sum to 1.
    attention: soft gate of attention experts; `None` where the attention is averaged.
    tokens: number of tokens.
    """

    experts: tuple[str, ...]
    probability: Tensor
    chosen: Tensor
    attention: Tensor | None
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return means over layers by expert, and the values of each layer."""
        tensors = {"probability": self.probability, "chosen": self.chosen, "attention": self.attention}
        return {
            "tokens": self.tokens,
            **{
                name: None if value is None else dict(zip(self.experts, value.mean(0).tolist(), strict=True))
                for name, value in tensors.items()
            },
            "layers": {name: None if value is None else value.tolist() for name, value in tensors.items()},
        }


@torch.inference_mode()
def routing_shares(
    model: Decoder, tokenizer: Tokenizer, texts: Iterable[str], *, max_tokens: int = 512
) -> RoutingShares:
    """Measure how the tokens of `texts`, each cut to `max_tokens`, are routed.

    Raises `UserError` for a dense model, and where there is no text.
    """
    mixture = model.config.mixture
    if mixture is None:
        raise UserError("the model is dense: it routes nothing", hint="give a mixture: see `koine upcycle`")
    device = model.embedding.weight.device
    experts, layers = len(mixture.experts), len(model.config.layers)
    probability_le = torch.zeros(layers, experts, dtype=torch.float64)
    chosen_le, attention_le = torch.zeros_like(probability_le), torch.zeros_like(probability_le)
    total = 0
    for text in texts:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)][:max_tokens]
        routings: list[Routing] = []
        model(torch.tensor([ids], device=device), routings=routings)
        total += len(ids)
        for layer, routing in enumerate(routings):
            probability_le[layer] += routing.probabilities.sum(dim=(0, 1)).double().cpu()
            counts_e = torch.bincount(routing.experts.flatten(), minlength=experts).double().cpu()
            chosen_le[layer] += counts_e / mixture.top_k
            if routing.attention_logits is not None:
                attention_le[layer] += routing.attention_logits.softmax(-1).sum(dim=(0, 1)).double().cpu()
    if not total:
        raise UserError("there is no text to route", hint="give at least one document")
    return RoutingShares(
        mixture.experts,
        probability_le / total,
        chosen_le / total,
        None if mixture.attention == "averaged" else attention_le / total,
        total,
    )


def has_experts(model: LanguageModel) -> bool:
    """Return whether a model is a mixture of experts."""
    return isinstance(model, Decoder) and model.config.mixture is not None


def measure_routing(setup: EvaluationSetup, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Run `routing_shares` as an entry of the table of evaluations: by domain, else by language."""
    model = setup.model
    assert isinstance(model, Decoder)
    texts: dict[str, list[str]] = {}
    for record in records:
        if "text" in record:
            texts.setdefault(str(record.get("domain") or record["language"]), []).append(record["text"])
    return {
        "routing": {
            name: routing_shares(model, setup.tokenizer, part).to_json() for name, part in texts.items()
        }
    }


def routing_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return a table of shares, and heat maps: domains by experts for each router, layers by experts."""
    routing = result.get("routing")
    if not routing:
        return []
    first = next(iter(routing.values()))
    experts = list(first["chosen"])

    def by_domain(title: str, key: str) -> Block:
        values = [[entry[key][expert] for expert in experts] for entry in routing.values()]
        return _heat_map(title, list(routing), experts, values)

    rows = [
        [name, *(f"{entry['chosen'][one]:.1%} ({entry['probability'][one]:.2f})" for one in experts)]
        for name, entry in routing.items()
    ]
    blocks: list[Block] = [
        {
            "kind": "table",
            "title": "Share of tokens that goes to each expert (router's probability)",
            "columns": ["", *experts],
            "rows": rows,
        },
        by_domain("Tokens by domain and feed-forward expert", "chosen"),
        by_domain("Router's probability by domain and feed-forward expert", "probability"),
    ]
    if first["attention"] is not None:
        blocks.append(by_domain("Gate by domain and attention expert", "attention"))
    layers = [f"layer {number}" for number in range(len(first["layers"]["chosen"]))]
    blocks += [
        _heat_map(
            f"Tokens of {name} by layer and feed-forward expert", layers, experts, entry["layers"]["chosen"]
        )
        for name, entry in routing.items()
    ]
    return blocks


def _heat_map(title: str, rows: list[str], columns: list[str], values: list[list[float]]) -> Block:
    return {
        "kind": "heatmap",
        "title": title,
        "label": "share",
        "rows": rows,
        "columns": columns,
        "values": values,
    }
