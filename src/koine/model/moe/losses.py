"""Router losses: load balance and z-loss.

The load-balancing loss multiplies the shares of the expert assignments with the mean probabilities, so it is
not a sum over rows. It is computed over the whole step: all micro batches and ranks. `StepTotals` counts the
assignments before the first gradient:

| micro batches on each rank | cost |
|---|---|
| one, one rank | nothing |
| one, several ranks | one all-reduce of `layers * experts` numbers inside the forward pass |
| several | a forward pass of every micro batch without head and backward pass: about a third of a step |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from koine.model.config import MixtureConfig
from koine.model.moe.routers import Routing


def load_balancing_loss(probabilities: Tensor, experts: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return `N sum_i f_i P_i`, a scalar (arXiv 2408.08274, equation 6).

    It is 1 where the load is even and `N` where one expert has all tokens.

    Args:
        probabilities: `[tokens, experts]`; their mean over tokens is `P`.
        experts: `[tokens, k]`, the assigned experts; `f` are their shares of the `tokens * k` assignments.
        counted: `[tokens]` bool, False for padding.
    """
    if counted is not None:
        probabilities, experts = probabilities[counted], experts[counted]
    count = probabilities.shape[-1]
    assignments = torch.bincount(experts.flatten(), minlength=count).to(probabilities.dtype)
    share = assignments / max(1, experts.numel())
    mean = probabilities.sum(dim=0) / max(1, len(probabilities))
    return count * (share * mean).sum()


def router_z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean over tokens of `logsumexp(logits)^2`, a scalar (arXiv 2202.08906, equation 5).

    Args:
        logits: `[tokens, experts]`.
        counted: `[tokens]` bool, False for padding.
    """
    if counted is not None:
        logits = logits[counted]
    return logits.logsumexp(dim=-1).square().sum() / max(1, len(logits))


def router_loss(
    routings: Sequence[Routing], mixture: MixtureConfig, counted: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """Compute `load_balancing * L_LB + z_loss * L_z`, summed over layers.

    arXiv 2408.08274, equations 5 to 7. The load is balanced over the feed-forward experts only. The z-loss
    includes the attention router's logits, where there is one.

    Args:
        routings: one for each layer.
        mixture: its factors.
        counted: `[batch, time]` bool, False for padding.

    Returns:
        The loss, a scalar in nats, and as metrics the mean of each loss over the layers.
    """
    flat = None if counted is None else counted.flatten()
    balance = z = torch.zeros((), device=routings[0].logits.device)
    for routing in routings:
        experts = routing.experts.flatten(0, 1)
        balance = balance + load_balancing_loss(routing.probabilities.flatten(0, 1), experts, flat)
        for logits in (routing.logits, routing.attention_logits):
            if logits is not None:
                z = z + router_z_loss(logits.flatten(0, 1), flat)
    return _weighted(balance, z, mixture, len(routings))


def router_loss_sum(
    routings: Sequence[Routing], mixture: MixtureConfig, counted: Tensor | None, units: float
) -> tuple[Tensor, dict[str, float]]:
    """Compute this micro batch's part of the step's router loss, as a sum over units.

    The sum over a step's micro batches and ranks, divided by the step's units, is `router_loss` of all of its
    tokens at once, however the rows are split. So are its gradients and its metrics.

    Args:
        routings: one for each layer.
        mixture: its factors.
        counted: `[batch, time]` bool, False for padding.
        units: those of the objective's loss in this micro batch.
    """
    totals = current_totals()
    if totals is None:
        loss, metrics = router_loss(routings, mixture, counted)
        return units * loss, {name: units * value for name, value in metrics.items()}
    if not totals.complete:
        # The only micro batch of each rank.
        totals.add(routings, counted, units)
        totals.finish()
    assert totals.assignments is not None
    scale = totals.units / max(1.0, totals.tokens)
    balance = z = torch.zeros((), device=routings[0].logits.device)
    for routing, assignments in zip(routings, totals.assignments, strict=True):
        probabilities = _counted_rows(routing.probabilities, counted)
        share = (assignments / assignments.sum().clamp(min=1.0)).to(probabilities.dtype)
        balance = balance + len(share) * (share * probabilities.sum(dim=0)).sum()
        for logits in (routing.logits, routing.attention_logits):
            if logits is not None:
                z = z + _counted_rows(logits, counted).logsumexp(dim=-1).square().sum()
    return _weighted(scale * balance, scale * z, mixture, len(routings))


def _counted_rows(values: Tensor, counted: Tensor | None) -> Tensor:
    """Flatten `[batch, time, experts]` to the rows that are no padding, `[tokens, experts]`."""
    return values.flatten(0, 1) if counted is None else values[counted]


def _weighted(
    balance: Tensor, z: Tensor, mixture: MixtureConfig, layers: int
) -> tuple[Tensor, dict[str, float]]:
    metrics = {
        "load_balancing_loss": float(balance.detach()) / layers,
        "router_z_loss": float(z.detach()) / layers,
    }
    return mixture.load_balancing * balance + mixture.z_loss * z, metrics


class AllReduce(Protocol):
    """Sums over the processes of a training, as `koine.train.distributed.Ranks` has them."""

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one process."""

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""


class StepTotals:
    """Totals of a step over its micro batches and ranks, which the router losses of each micro batch need.

    Attributes:
        assignments: `[layers, experts]` float64, tokens assigned to each expert.
        tokens: how many tokens are counted (all but padding).
        units: those of the objective's loss.
        counting: True during the forward passes that only count.
        complete: whether the sums are those of all micro batches and ranks.
    """

    def __init__(self, ranks: AllReduce) -> None:
        self.ranks = ranks
        self.counting = False
        self.complete = False
        self.assignments: Tensor | None = None
        self.tokens = self.units = 0.0

    def add(self, routings: Sequence[Routing], counted: Tensor | None, units: float) -> None:
        """Add one micro batch."""
        found = torch.stack([_assignments(routing, counted) for routing in routings])
        self.assignments = found if self.assignments is None else self.assignments + found
        self.tokens += float(counted.sum() if counted is not None else routings[0].logits[..., 0].numel())
        self.units += units

    def finish(self) -> None:
        """Sum over the ranks. Call it once, after the last `add`."""
        assert self.assignments is not None
        sums = torch.tensor([self.tokens, self.units], dtype=torch.float64, device=self.assignments.device)
        total = self.ranks.sum(torch.cat((self.assignments.flatten(), sums)))
        self.assignments = total[:-2].view_as(self.assignments)
        self.tokens, self.units = total[-2:].tolist()
        self.complete = True


def _assignments(routing: Routing, counted: Tensor | None) -> Tensor:
    """Count the tokens assigned to each expert, `[experts]` float64."""
    experts = routing.experts if counted is None else routing.experts[counted]
    return torch.bincount(experts.flatten(), minlength=routing.probabilities.shape[-1]).double()


_TOTALS: ContextVar[StepTotals | None] = ContextVar("totals", default=None)


@contextmanager
def use_totals(totals: StepTotals | None) -> Iterator[None]:
    """Make objectives called inside compute one micro batch of the step with these totals.

    None: the batch that they get is the whole step.
    """
    token = _TOTALS.set(totals)
    try:
        yield
    finally:
        _TOTALS.reset(token)


def current_totals() -> StepTotals | None:
    """Return the totals given by `use_totals`; None where the batch is the whole step."""
    return _TOTALS.get()


def count_step(
    model: Any, objective: Callable[[Any, Any], Any], batches: Iterable[Any], count: int, ranks: AllReduce
) -> StepTotals | None:
    """Compute the totals of a step, or return None where one micro batch is the whole step.

    A mixture of experts runs a forward pass of each micro batch where there are several. Gradients stay
    enabled, so that the same kernels assign the same experts as in the pass that follows.

    Args:
        model: a `Decoder`.
        objective: called with the model and each micro batch.
        batches: the micro batches on this rank.
        count: how many there are.
        ranks: the processes to sum over.
    """
    if count == 1 and not ranks.is_distributed:
        return None
    totals = StepTotals(ranks)
    if count == 1 or not has_experts(model):
        return totals
    totals.counting = True
    with use_totals(totals):
        for batch in batches:
            objective(model, batch)
    totals.counting = False
    # None: an objective without router losses.
    if totals.assignments is not None:
        totals.finish()
    return totals


def has_experts(model: Any) -> bool:
    """Whether the model is a `Decoder` with experts."""
    return isinstance(getattr(getattr(model, "config", None), "mixture", None), MixtureConfig)
