"""Loss specifications: `dpo:beta=0.1+nll:weight=0.2` is a weighted sum of losses.

    TERM [+ TERM ...]        TERM = NAME [: KEY=NUMBER [, KEY=NUMBER ...]]

The names are those of `koine.align.loss_terms.LOSSES`, the keys the fields of their classes. Every term also
takes `weight` (default 1).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koine.align.loss_terms import LOSSES, Loss, LossInputs
from koine.data.groups import Group, GroupKind
from koine.errors import UserError, did_you_mean
from koine.fields import check_number, short_repr

if TYPE_CHECKING:
    from koine.align.log_probabilities import LogProbabilities

_PLUS = re.compile(r"\+(?=\s*[A-Za-z]|\s*$)")
"""Separates terms. The sign of an exponent (`1e+3`) has a digit behind it."""
_FEWEST = {"preferences": 2, "labelled": 1, "scored": 2}


@dataclass(frozen=True)
class Term:
    """A loss of a specification and the factor that it is added with.

    Attributes:
        name: Its name in `LOSSES`.
        loss: The loss with its parameters.
        weight: Greater than 0.
    """

    name: str
    loss: Loss
    weight: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", check_number("weight", self.weight, above=0, high=1e6))

    def __str__(self) -> str:
        """Return the term as text: the first parameter always, others where they are not the default."""
        fields = dataclasses.fields(self.loss)
        values = [(field.name, getattr(self.loss, field.name), field.default) for field in fields]
        shown = [(name, value) for i, (name, value, usual) in enumerate(values) if not i or value != usual]
        if self.weight != 1:
            shown.append(("weight", self.weight))
        settings = ",".join(f"{name}={repr(value).removesuffix('.0')}" for name, value in shown)
        return f"{self.name}:{settings}" if settings else self.name


@dataclass(frozen=True)
class LossSpec:
    """A weighted sum of losses of one kind of groups.

    Call it with log-probabilities; make one from text with `LossSpec.parse`. `str()` gives the canonical text.

    Raises `UserError` for no term, a loss that stands twice, or losses of different kinds of groups.
    """

    terms: tuple[Term, ...]

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names:
            raise UserError("the loss has no term", hint=f"known losses: {', '.join(LOSSES)}")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"the loss '{name}' stands twice", where=f"loss '{self}'", hint="add it once")
        first = self.terms[0]
        for term in self.terms:
            if term.loss.groups != first.loss.groups:
                raise UserError(
                    f"'{first.name}' takes {first.loss.groups} groups and '{term.name}' {term.loss.groups} ones",
                    where=f"loss '{self}'",
                    hint="add losses of one kind of groups",
                )

    @classmethod
    def parse(cls, text: str) -> LossSpec:
        """Return the specification that `text` describes; `UserError` where it is none."""
        where = f"loss {short_repr(text)}"
        return cls(tuple(_parse_term(part.strip(), where) for part in _PLUS.split(text)))

    def __str__(self) -> str:
        return "+".join(map(str, self.terms))

    def identity(self) -> dict[str, Any]:
        """Return every parameter as JSON values: equal ones are the same loss."""
        return {term.name: {"weight": term.weight, **dataclasses.asdict(term.loss)} for term in self.terms}

    @property
    def groups(self) -> GroupKind:
        """The kind of groups that it takes."""
        return self.terms[0].loss.groups

    @property
    def completions(self) -> int | None:
        """Completions of each group that it takes: 2, 6 (with revisions), or None for any number."""
        counts = [term.loss.completions for term in self.terms]
        return max((count for count in counts if count is not None), default=None)

    @property
    def fewest_completions(self) -> int:
        """Least number of completions of a group."""
        return self.completions or _FEWEST[self.groups]

    @property
    def needs_reference(self) -> bool:
        """Whether a term reads the reference's log-probabilities."""
        return any(term.loss.needs_reference for term in self.terms)

    @property
    def needs_reference_point(self) -> bool:
        """Whether a term needs `kto_reference_point` of the whole step."""
        return self.groups == "labelled"

    def check_groups(self, kind: str, counts: Iterable[int], where: str | Path | None = None) -> None:
        """Raise `UserError` for groups that the loss cannot take.

        Args:
            kind: of the groups.
            counts: numbers of completions that groups have.
            where: their source, for the message.
        """
        if kind != self.groups:
            raise UserError(
                f"holds {kind} groups, and the loss '{self}' takes {self.groups} ones",
                where=where,
                hint=f"tokenize records with `--kind {self.groups}`, or choose a loss of {kind} groups: "
                + ", ".join(name for name, loss in LOSSES.items() if loss.groups == kind),
            )
        fewest = self.fewest_completions
        for count in counts:
            if count < fewest:
                raise UserError(
                    f"a group has {count} completion{'s' * (count != 1)}, and the loss '{self}' takes "
                    f"{'at least ' * (self.completions is None)}{fewest}",
                    where=where,
                    hint="SRPO's groups need revisions of both answers"
                    if fewest > 2
                    else f"give {fewest} completions of each prompt",
                )

    def __call__(
        self,
        policy: LogProbabilities,
        reference: Tensor | None,
        groups: Sequence[Group],
        *,
        behaviour: Tensor | None = None,
        reference_point: Tensor | float | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each group and metrics of each group.

        Args:
            policy: sums and lengths of C completions; those of a group are adjacent and in order.
            reference: `[C]`, sums under the reference. None where the loss needs none.
            groups: G groups.
            behaviour: `[C]`, sums when the completions were drawn; None: those of `policy`.
            reference_point: KTO's z0 of the whole step.

        Returns:
            The loss, `[G]`, with gradient; metrics, each `[G]` without gradient: see `group_metrics`, and
            `NAME_loss` of each term, before its weight, where there is more than one.

        Raises `UserError` for groups that the loss cannot take, and where the reference is missing.
        """
        if self.needs_reference and reference is None:
            raise UserError(
                f"the loss '{self}' needs a reference", hint="use --reference start or --reference MODEL"
            )
        if not groups:
            return policy.sums[:0], {}
        sizes = [self._size(group, len(policy.sums) // len(groups)) for group in groups]
        if sum(sizes) != len(policy.sums):
            raise ValueError(f"{len(policy.sums)} log-probabilities for {sum(sizes)} completions")
        losses, metrics, places = [], [], []
        for rows, places_of_size in _by_size(sizes):
            inputs = _inputs(
                policy, reference, behaviour, reference_point, [groups[i] for i in places_of_size], rows
            )
            loss, values = self._of_equal_size(inputs)
            losses.append(loss)
            metrics.append(values)
            places += places_of_size
        order = torch.tensor(places, device=policy.sums.device).argsort()
        return torch.cat(losses)[order], {
            name: torch.cat([values[name] for values in metrics])[order] for name in metrics[0]
        }

    def _size(self, group: Group, of_a_pair: int) -> int:
        counts = {"preferences": of_a_pair, "labelled": len(group.labels), "scored": len(group.scores)}
        self.check_groups(group.kind, [counts[group.kind]], group.source)
        return counts[group.kind]

    def _of_equal_size(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        total: Tensor | None = None
        metrics = group_metrics(inputs)
        for term in self.terms:
            loss = term.loss(_first(inputs, term.loss.completions))
            if len(self.terms) > 1:
                metrics[f"{term.name}_loss"] = loss.detach()
            weighted = loss if term.weight == 1 else term.weight * loss
            total = weighted if total is None else total + weighted
        assert total is not None
        return total, metrics


def group_metrics(inputs: LossInputs) -> dict[str, Tensor]:
    """Return what is shown of each group, `[G]` each, without gradient.

    - Preferences: `log_probability_chosen` and `log_probability_rejected`, nats per token. With a reference
      `margin`, the difference of the log-ratios in nats, and `accuracy`: the probability of the label that the
      sign of the margin agrees with, 0.5 where the margin is 0.
    - Labelled and scored: `log_probability`, nats per token, and `log_ratio` to the reference in nats, means
      over the completions; scored also `score`.
    """
    means, reference = inputs.policy_means.detach(), inputs.reference
    ratios = None if reference is None else inputs.policy.detach() - reference
    if inputs.scores is None and inputs.labels is None:
        metrics = {"log_probability_chosen": means[:, 0], "log_probability_rejected": means[:, 1]}
        if ratios is not None:
            margin = ratios[:, 0] - ratios[:, 1]
            certainty = 1.0 if inputs.probability is None else 2 * inputs.probability - 1
            metrics |= {"margin": margin, "accuracy": (1 + margin.sign() * certainty) / 2}
        return metrics
    metrics = {"log_probability": means.mean(dim=1)}
    if ratios is not None:
        metrics["log_ratio"] = ratios.mean(dim=1)
    if inputs.scores is not None:
        metrics["score"] = inputs.scores.mean(dim=1)
    return metrics


def _parse_term(text: str, where: str) -> Term:
    name, _, settings = (part.strip() for part in text.partition(":"))
    if name not in LOSSES:
        raise UserError(f"unknown loss {short_repr(name)}", where=where, hint=did_you_mean(name[:60], LOSSES))
    keys = [field.name for field in dataclasses.fields(LOSSES[name])]
    values: dict[str, float] = {}
    for setting in settings.split(",") if settings else ():
        key, equals, number = (part.strip() for part in setting.partition("="))
        if not equals:
            raise UserError(f"{short_repr(setting.strip())} is not key=value", where=where)
        if key not in (*keys, "weight"):
            hint = did_you_mean(key[:60], (*keys, "weight"))
            raise UserError(f"'{name}' has no parameter {short_repr(key)}", where=where, hint=hint)
        if key in values:
            raise UserError(f"'{key}' is given twice", where=where, hint="give it once")
        try:
            values[key] = float(number)
        except ValueError:
            raise UserError(
                f"{key} is {short_repr(number)}", where=where, hint="it must be a number"
            ) from None
    weight = values.pop("weight", 1.0)
    try:
        return Term(name, LOSSES[name](**values), weight)
    except UserError as error:
        raise UserError(f"{name}: {error.what}", where=where, hint=error.hint) from None


def _by_size(sizes: Sequence[int]) -> list[tuple[Tensor, list[int]]]:
    """Return for each number k of completions the places of its groups, and of their completions, `[G_k, k]`."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    found = []
    for size in sorted(set(sizes)):
        places = [place for place, one in enumerate(sizes) if one == size]
        found.append((starts[places][:, None] + torch.arange(size), places))
    return found


def _inputs(
    policy: LogProbabilities,
    reference: Tensor | None,
    behaviour: Tensor | None,
    reference_point: Tensor | float | None,
    groups: Sequence[Group],
    rows: Tensor,
) -> LossInputs:
    device, dtype = policy.sums.device, policy.sums.dtype
    rows = rows.to(device)
    kind = groups[0].kind
    probability = labels = scores = None
    if kind == "preferences" and any(group.probability != 1 for group in groups):
        probability = torch.tensor([group.probability for group in groups], dtype=dtype, device=device)
    elif kind == "labelled":
        labels = torch.tensor([group.labels for group in groups], device=device)
    elif kind == "scored":
        scores = torch.tensor([group.scores for group in groups], dtype=dtype, device=device)
    return LossInputs(
        policy=policy.sums[rows],
        lengths=policy.lengths[rows],
        reference=None if reference is None else reference[rows],
        probability=probability,
        labels=labels,
        scores=scores,
        behaviour=None if behaviour is None else behaviour[rows],
        reference_point=reference_point,
    )


def _first(inputs: LossInputs, count: int | None) -> LossInputs:
    """Return the inputs of the first `count` completions of each group: a loss of pairs on SRPO's groups."""
    if count is None or count == inputs.policy.shape[1]:
        return inputs
    policy, lengths, reference = inputs.policy, inputs.lengths, inputs.reference
    return inputs._replace(
        policy=policy[:, :count],
        lengths=lengths[:, :count],
        reference=None if reference is None else reference[:, :count],
    )
