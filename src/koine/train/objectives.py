"""Objectives: callables from a model and a batch to the SUM of the loss over the batch's units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from koine.errors import UserError
from koine.model.moe.losses import AllReduce, current_totals, has_experts, router_loss_sum
from koine.train.fingerprint import arguments_identity
from koine.train.loss import IGNORE, chunked_cross_entropy

if TYPE_CHECKING:
    from koine.data.batch import Batch
    from koine.data.shards import TokenSource
    from koine.model.moe.routers import Routing


class Objective(Protocol):
    """The loss that training minimises. Write one as a frozen dataclass whose fields are its arguments.

    For example, cross-entropy plus the divergence from a teacher::

        @dataclass(frozen=True)
        class Distillation:
            teacher: Decoder
            kl_weight: float = 0.5

            def __call__(self, model, batch):
                ...
                return loss_sum, {"units": units, "kl": kl_sum}

            def identity(self):
                return arguments_identity(self)
    """

    def __call__(self, model: Any, batch: Any, /) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch of the data order (`Batch`, or `GroupBatch` of groups), a scalar summed
        over the units, and metrics.

        `metrics["units"]` is the number of units; every other metric is a sum over them too. The loop divides
        loss and metrics by the units of all micro-batches and ranks.
        """

    def identity(self) -> dict[str, Any]:
        """Return the arguments as JSON values, reference and teacher models by their sha256.

        Two trainings are the same one only if these are equal.
        """


@runtime_checkable
class StepObjective(Protocol):
    """An objective that needs something of the whole step before its first gradient."""

    def of_step(self, model: Any, batches: Iterable[Any], ranks: AllReduce, /) -> Objective:
        """Return the objective of one step's micro batches.

        Args:
            model: it computes without gradients here.
            batches: the micro batches on this rank; those of other ranks may have more or less in them.
            ranks: the processes to sum over.
        """
        ...


def objective_of_step(
    objective: Objective, model: Any, batches: Iterable[Any], ranks: AllReduce
) -> Objective:
    """Return the objective of a step; see `StepObjective`."""
    return objective.of_step(model, batches, ranks) if isinstance(objective, StepObjective) else objective


@dataclass(frozen=True)
class LanguageModelling:
    """Next-token cross-entropy in nats over the targets that are not -100, which are the units.

    A mixture of experts adds its router losses (`koine.model.moe.losses`), which are metrics of their own.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> tuple[Tensor, dict[str, float]]:
        return _next_token_loss(model, batch)

    def identity(self) -> dict[str, Any]:
        """Return no arguments: there are none."""
        return arguments_identity(self)


@dataclass(frozen=True)
class SupervisedFineTuning:
    """`LanguageModelling` on the completion tokens of chats.

    Raises `UserError` for a batch without any, unless it is one micro-batch of several.
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> tuple[Tensor, dict[str, float]]:
        if current_totals() is None and not bool((batch.targets != IGNORE).any()):
            raise UserError(
                "a batch of chats has no completion token to learn from",
                hint="tokenize records with assistant messages, and choose a sequence length "
                "that holds their answers",
            )
        return _next_token_loss(model, batch)

    def identity(self) -> dict[str, Any]:
        """Return no arguments: there are none."""
        return arguments_identity(self)


def _next_token_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    units = int((batch.targets != IGNORE).sum())
    counted = None if batch.document_ids is None else batch.document_ids >= 0
    routings: list[Routing] | None = None
    if has_experts(model):
        routings = []
        hidden_btd = model(batch.tokens, document_ids=batch.document_ids, routings=routings)
        totals = current_totals()
        if totals is not None and totals.counting:
            totals.add(routings, counted, units)
            return hidden_btd.new_zeros(()), {"units": float(units)}
    else:
        hidden_btd = model(batch.tokens, document_ids=batch.document_ids)
    loss = _cross_entropy_sum(model, hidden_btd, batch.targets)
    metrics = {"units": float(units)}
    if routings is not None:
        # Summed over the units too, so that they weigh as much as in the papers' mean loss.
        mixture: Any = model.config.mixture  # type: ignore[union-attr]
        router_loss, router_metrics = router_loss_sum(routings, mixture, counted, units)
        loss = loss + router_loss
        metrics |= router_metrics
    return loss, metrics


def _cross_entropy_sum(model: nn.Module, hidden_btd: Tensor, targets_bt: Tensor) -> Tensor:
    weight = getattr(model, "output_weight", None)
    if weight is not None:
        scale = float(getattr(model, "logit_scale", 1.0))
        cap = getattr(model, "logit_softcap", None)
        return chunked_cross_entropy(hidden_btd, weight, targets_bt, scale=scale, softcap=cap)
    # A model of `transformers` keeps its own head: logits of one row of the batch at a time.
    loss = torch.zeros((), device=hidden_btd.device)
    for hidden_td, targets_t in zip(hidden_btd, targets_bt, strict=True):
        logits_tv = model.logits(hidden_td)  # type: ignore[operator]
        loss = loss + F.cross_entropy(logits_tv.float(), targets_t, ignore_index=IGNORE, reduction="sum")
    return loss


def check_chats(sources: Iterable[TokenSource]) -> None:
    """Raise `UserError` for token shards of documents: all their tokens would carry loss, unasked."""
    for source in sources:
        if not source.chat:
            raise UserError(
                "holds no chats, so nothing says which tokens are completions",
                where=source.path,
                hint="tokenize records with messages, or use `koine train pretrain` for documents",
            )
