"""Router losses of a mixture of experts: load balance and z-loss.

The balance loss multiplies the shares of the choices with the mean probabilities, so it is not a sum over
rows: both are those of the whole step, over all micro batches and ranks. `WholeStep` counts the choices
before the first gradient:

| micro batches on each rank | what it costs |
|---|---|
| one, one rank | nothing |
| one, several ranks | one all-reduce of `layers * experts` numbers inside the forward pass |
| several | a forward pass of every micro batch without its head and without a backward pass: about a third of a step |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from koine.model.config import MixtureConfig
from koine.model.moe.experts import load_balancing_loss, router_z_loss
from koine.model.moe.routers import Routing
from koine.train.distributed import Ranks


def has_experts(model: Any) -> bool:
    """Whether a model of ours is a mixture of experts."""
    return isinstance(getattr(getattr(model, "config", None), "mixture", None), MixtureConfig)


class WholeStep:
    """Totals of a step over its micro batches and ranks, for the losses of its parts.

    choices: `[layers, experts]`, how often each expert was chosen. tokens: those that count. units: those of
    the loss.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.counting = False
        self.complete = False
        self.choices: Tensor | None = None
        self.tokens = self.units = 0.0

    def add(self, routings: Sequence[Routing], counted: Tensor | None, units: float) -> None:
        """Count one micro batch."""
        found = torch.stack([_choices(routing, counted) for routing in routings])
        self.choices = found if self.choices is None else self.choices + found
        self.tokens += float(counted.sum() if counted is not None else routings[0].logits[..., 0].numel())
        self.units += units

    def finish(self) -> None:
        """Sum over the ranks; no more can be added."""
        assert self.choices is not None
        sums = torch.tensor([self.tokens, self.units], dtype=torch.float64, device=self.choices.device)
        total = self.ranks.sum(torch.cat((self.choices.flatten(), sums)))
        self.choices = total[:-2].view_as(self.choices)
        self.tokens, self.units = total[-2:].tolist()
        self.complete = True


_STEP: ContextVar[WholeStep | None] = ContextVar("step", default=None)


@contextmanager
def part_of(step: WholeStep | None) -> Iterator[None]:
    """Objectives that are worked out inside see one part of `step`; None: what they see is all of it."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def current_step() -> WholeStep | None:
    """The step of which one part is being worked out; None where that part is all."""
    return _STEP.get()


def whole_step(
    model: Any, objective: Callable[[Any, Any], Any], batches: Iterable[Any], count: int, ranks: Ranks
) -> WholeStep | None:
    """Compute the totals that the losses of a step's parts need; None where one part is all.

    batches: the step's micro batches on this rank, `count` of them; a mixture of experts reads them where
    there are several. It routes with gradients on, so that the same kernels choose the same experts as in the
    pass that follows.
    """
    if count == 1 and not ranks.several:
        return None
    step = WholeStep(ranks)
    if count == 1 or not has_experts(model):
        return step
    step.counting = True
    with part_of(step):
        for batch in batches:
            objective(model, batch)
    step.counting = False
    # None: an objective without router losses.
    if step.choices is not None:
        step.finish()
    return step


def _choices(routing: Routing, counted: Tensor | None) -> Tensor:
    """Count how often each expert was chosen, `[experts]` float64."""
    chosen = routing.chosen if counted is None else routing.chosen[counted]
    return torch.bincount(chosen.flatten(), minlength=routing.probabilities.shape[-1]).double()


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


def router_loss_sum(
    routings: Sequence[Routing], mixture: MixtureConfig, counted: Tensor | None, units: float
) -> tuple[Tensor, dict[str, float]]:
    """`router_loss` of the whole step as a sum over units: the part that these rows have in it, and in its
    metrics.

    The sum over a step's parts, divided by the step's units, is the router loss of all of its tokens at once,
    whatever the rows are split into; so are its gradients.
    """
    step = current_step()
    if step is None:
        loss, metrics = router_loss(routings, mixture, counted)
        return units * loss, {name: units * value for name, value in metrics.items()}
    if not step.complete:
        # The only micro batch of each rank.
        step.add(routings, counted, units)
        step.finish()
    assert step.choices is not None
    scale = step.units / max(1.0, step.tokens)
    balance = z = torch.zeros((), device=routings[0].logits.device)
    for routing, choices in zip(routings, step.choices, strict=True):
        every = (routing.probabilities, routing.logits, routing.attention_logits)
        rows = [
            None if one is None else one.flatten(0, 1) if counted is None else one[counted] for one in every
        ]
        probabilities, *logits = rows
        assert probabilities is not None
        share = (choices / choices.sum().clamp(min=1.0)).to(probabilities.dtype)
        balance = balance + len(share) * (share * probabilities.sum(dim=0)).sum()
        for one in logits:
            if one is not None:
                z = z + one.logsumexp(dim=-1).square().sum()
    balance, z = scale * balance, scale * z
    metrics = {
        "load_balancing_loss": float(balance.detach()) / len(routings),
        "router_z_loss": float(z.detach()) / len(routings),
    }
    return mixture.load_balancing * balance + mixture.z_loss * z, metrics
