"""What the routers of a mixture add to the loss: balance of the experts' load, and logits that stay small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from koine.model.config import MixtureConfig
from koine.model.experts import load_balancing_loss, router_z_loss
from koine.model.routers import Routing


def has_experts(model: Any) -> bool:
    """Whether a model of ours is a mixture of experts."""
    return isinstance(getattr(getattr(model, "config", None), "mixture", None), MixtureConfig)


def router_loss(
    routings: Sequence[Routing], mixture: MixtureConfig, counted: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """`load_balancing * L_LB + z_loss * L_z`, summed over the layers (arXiv 2408.08274, equations 5 to 7).

    counted: `[batch, time]`, False for padding.

    Returns the loss, a scalar in nats, and both losses' means over the layers as metrics. The load is balanced over the feed-forward
    experts only; the z-loss has the attention router's logits too, where there is one.
    """
    flat = None if counted is None else counted.flatten()
    balance = z = torch.zeros((), device=routings[0].logits.device)
    for routing in routings:
        chosen = routing.chosen.flatten(0, 1)
        balance = balance + load_balancing_loss(routing.probabilities.flatten(0, 1), chosen, flat)
        for logits in (routing.logits, routing.attention_logits):
            if logits is not None:
                z = z + router_z_loss(logits.flatten(0, 1), flat)
    metrics = {
        "load_balancing_loss": float(balance.detach()) / len(routings),
        "router_z_loss": float(z.detach()) / len(routings),
    }
    return mixture.load_balancing * balance + mixture.z_loss * z, metrics
