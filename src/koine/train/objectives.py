"""What the loop minimises: a function from a model and a batch to the SUM of the loss over the batch's units."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from koine.errors import UserError
from koine.model.moe.losses import current_totals, has_experts, router_loss_sum
from koine.train.loss import IGNORE, chunked_cross_entropy

if TYPE_CHECKING:
    from koine.data.batch import Batch
    from koine.data.shards import TokenSource
    from koine.model.moe.routers import Routing

Objective = Callable[[Any, "Batch"], tuple[Tensor, dict[str, float]]]
"""`loss_sum, metrics = objective(model, batch)`; `metrics["units"]` says over how many units the sum runs, the others are sums
over the units too (the loop divides both by the units of all micro batches and ranks)."""


def language_modelling(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Next-token cross-entropy; the units are the targets that are not -100. The loss is a sum in nats.

    Serves pretraining and supervised fine-tuning alike: what carries loss is said by `batch.targets`. A mixture of experts adds the losses
    of its routers (`koine.model.moe.losses`), which the metrics show apart.
    """
    units = int((batch.targets != IGNORE).sum())
    routings: list[Routing] | None = None
    counted = None if batch.document_ids is None else batch.document_ids >= 0
    if has_experts(model):
        routings = []
        hidden = model(batch.tokens, document_ids=batch.document_ids, routings=routings)
        totals = current_totals()
        if totals is not None and totals.counting:
            totals.add(routings, counted, units)
            return hidden.new_zeros(()), {"units": float(units)}
    else:
        hidden = model(batch.tokens, document_ids=batch.document_ids)
    weight = getattr(model, "output_weight", None)
    if weight is None:
        # Another architecture keeps its own head: its logits are taken a row of the batch at a time.
        import torch
        import torch.nn.functional as F

        loss = torch.zeros((), device=hidden.device)
        for row, targets in zip(hidden, batch.targets, strict=True):
            logits = model.logits(row)  # type: ignore[operator]
            loss = loss + F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    else:
        scale = float(getattr(model, "logit_scale", 1.0))
        loss = chunked_cross_entropy(hidden, weight, batch.targets, scale=scale)
    metrics = {"units": float(units)}
    if routings is not None:
        routing, of_routers = router_loss_sum(routings, model.config.mixture, counted, units)  # type: ignore[union-attr, arg-type]
        # The loss is a sum over the units, and the routers' losses are means: they weigh as much as in the papers' mean loss.
        loss = loss + routing
        metrics |= of_routers
    return loss, metrics


def check_plain_documents(sources: Iterable[TokenSource]) -> None:
    """Raise `UserError` for token shards that are no chats: every token of theirs would carry loss, unasked."""
    for source in sources:
        if not source.chat:
            raise UserError(
                "holds no chats, so nothing says which tokens are completions",
                where=source.path,
                hint="tokenize records with messages, or use `koine train pretrain` for documents",
            )


def supervised_fine_tuning(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """`language_modelling` on the completion tokens of chats.

    Raises `UserError` where a batch has none, unless it is a part of a step, whose other parts may have some.
    """
    if current_totals() is None and not bool((batch.targets != IGNORE).any()):
        raise UserError(
            "a batch of chats has no completion token to learn from",
            hint="tokenize records with assistant messages, and choose a sequence length that holds their answers",
        )
    return language_modelling(model, batch)
