"""The losses that a loss specification can name: each is a frozen dataclass of its parameters.

A loss is called with `LossInputs` and returns the loss of each group, `[G]`. `LOSSES` maps the names to the
classes. Formulas and conventions are in the functions that they call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from koine.align import losses, policy_losses, srpo
from koine.data.groups import GroupKind
from koine.fields import check_dataclass, checked_field

Takes = Literal["sums", "means"]
"""Whether a loss takes log-probabilities summed over a completion's tokens, or their mean."""
_LARGEST = 1e6
_STRENGTH = "Strength of the KL regularisation; a smaller one lets the policy move further."
_SCALE = "Scale of the difference; a larger one saturates earlier."


class LossInputs(NamedTuple):
    """What losses take: G groups of k completions each. Log-probabilities are sums over tokens."""

    policy: Tensor
    """`[G, k]`, with gradient."""
    lengths: Tensor
    """`[G, k]`, tokens of each completion."""
    reference: Tensor | None
    """`[G, k]`; None: there is no reference."""
    probability: Tensor | None = None
    """Preferences: `[G]`, that completion 0 is better than completion 1; None: 1 everywhere."""
    labels: Tensor | None = None
    """Labelled: `[G, k]` bool."""
    scores: Tensor | None = None
    """Scored: `[G, k]`."""
    behaviour: Tensor | None = None
    """`[G, k]`, log-probabilities when the completions were drawn; None: those of `policy`."""
    reference_point: Tensor | float | None = None
    """KTO's z0 of the whole step."""

    @property
    def policy_means(self) -> Tensor:
        """Log-probabilities per token, `[G, k]`."""
        return self.policy / self.lengths

    @property
    def reference_means(self) -> Tensor | None:
        """The reference's log-probabilities per token, `[G, k]`."""
        return None if self.reference is None else self.reference / self.lengths


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss with its parameters, which are checked when it is made."""

    groups: ClassVar[GroupKind] = "preferences"
    """The kind of groups that it takes."""
    completions: ClassVar[int | None] = 2
    """Completions that it takes of each group, from the first on; None: all."""
    takes: ClassVar[Takes] = "sums"
    reads_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_dataclass(self)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probabilities, with these parameters."""
        return self.reads_reference

    @abstractmethod
    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""


@dataclass(frozen=True, kw_only=True)
class Dpo(Loss):
    """DPO."""

    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)
    label_smoothing: float = checked_field(0.0, "Share of labels taken as wrong.", low=0, high=0.5)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.dpo(
            inputs.policy,
            _given(inputs.reference),
            inputs.probability,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True, kw_only=True)
class Robust(Loss):
    """Robust DPO."""

    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)
    label_smoothing: float = checked_field(0.1, "Share of labels that are wrong.", low=0, high=0.49)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.robust(
            inputs.policy,
            _given(inputs.reference),
            inputs.probability,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


@dataclass(frozen=True, kw_only=True)
class Ipo(Loss):
    """IPO on sums."""

    tau: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.ipo(inputs.policy, _given(inputs.reference), inputs.probability, tau=self.tau)


@dataclass(frozen=True, kw_only=True)
class IpoMean(Loss):
    """TRL's IPO, on means."""

    takes: ClassVar[Takes] = "means"
    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        means = _given(inputs.reference_means)
        return losses.ipo_mean(inputs.policy_means, means, inputs.probability, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Hinge(Loss):
    """TRL's hinge."""

    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.hinge(inputs.policy, _given(inputs.reference), inputs.probability, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Slic(Loss):
    """SLiC-HF, the Hinge of arXiv 2410.11677."""

    takes: ClassVar[Takes] = "means"
    alpha: float = checked_field(
        1.0, "Weight of the term that keeps the chosen one above the reference.", low=0, high=_LARGEST
    )
    gamma: float = checked_field(1.0, "Margin of the first term, in nats per token.", low=0, high=_LARGEST)

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probabilities."""
        return self.alpha > 0

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.slic(
            inputs.policy_means,
            inputs.reference_means,
            inputs.probability,
            alpha=self.alpha,
            gamma=self.gamma,
        )


@dataclass(frozen=True, kw_only=True)
class Simpo(Loss):
    """SimPO."""

    reads_reference: ClassVar[bool] = False
    takes: ClassVar[Takes] = "means"
    beta: float = checked_field(2.0, _SCALE, above=0, high=_LARGEST)
    gamma: float = checked_field(1.0, "Margin, after scaling.", low=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.simpo(inputs.policy_means, inputs.probability, beta=self.beta, gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class Nll(Loss):
    """Negative log-likelihood of the chosen completion, summed over its tokens."""

    reads_reference: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.nll(inputs.policy, inputs.probability)


@dataclass(frozen=True, kw_only=True)
class NllMean(Loss):
    """Negative log-likelihood of the chosen completion, per token."""

    reads_reference: ClassVar[bool] = False
    takes: ClassVar[Takes] = "means"

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return losses.nll(inputs.policy_means, inputs.probability)


@dataclass(frozen=True, kw_only=True)
class Srpo(Loss):
    """SRPO."""

    completions: ClassVar[int | None] = srpo.COMPLETIONS
    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)
    alpha: float = checked_field(0.5, "Share of the loss of revisions.", low=0, high=1)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return srpo.srpo(
            inputs.policy, _given(inputs.reference), inputs.probability, alpha=self.alpha, beta=self.beta
        )


@dataclass(frozen=True, kw_only=True)
class Kto(Loss):
    """KTO."""

    groups: ClassVar[GroupKind] = "labelled"
    completions: ClassVar[int | None] = None
    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)
    desirable_weight: float = checked_field(1.0, "Weight of desirable completions.", low=0, high=_LARGEST)
    undesirable_weight: float = checked_field(1.0, "Weight of undesirable ones.", low=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        if inputs.reference_point is None:
            raise ValueError("kto needs the reference point of the whole step")
        return losses.kto(
            inputs.policy,
            _given(inputs.reference),
            _given(inputs.labels),
            inputs.reference_point,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


@dataclass(frozen=True, kw_only=True)
class Copg(Loss):
    """Contrastive policy gradient."""

    groups: ClassVar[GroupKind] = "scored"
    completions: ClassVar[int | None] = None
    beta: float = checked_field(0.1, _STRENGTH, above=0, high=_LARGEST)

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        reference, scores = _given(inputs.reference), _given(inputs.scores)
        return policy_losses.copg(inputs.policy, reference, scores, beta=self.beta)


@dataclass(frozen=True, kw_only=True)
class Rloo(Loss):
    """REINFORCE with a leave-one-out baseline."""

    groups: ClassVar[GroupKind] = "scored"
    completions: ClassVar[int | None] = None
    beta: float = checked_field(0.05, "Weight of the KL penalty; 0: none.", low=0, high=_LARGEST)
    clip: float = checked_field(
        0.2, "Largest rewarded change of the probability since drawing.", above=0, high=1
    )

    @property
    def needs_reference(self) -> bool:
        """Whether it reads the reference's log-probabilities."""
        return self.beta > 0

    def __call__(self, inputs: LossInputs, /) -> Tensor:
        """Return the loss of each group, `[G]`."""
        return policy_losses.rloo(
            inputs.policy,
            inputs.reference,
            _given(inputs.scores),
            inputs.behaviour,
            beta=self.beta,
            clip=self.clip,
        )


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("the loss needs log-probabilities or labels that it was not given")
    return tensor


LOSSES: dict[str, type[Loss]] = {
    "dpo": Dpo,
    "ipo": Ipo,
    "slic": Slic,
    "nll": Nll,
    "srpo": Srpo,
    "copg": Copg,
    "rloo": Rloo,
    "robust": Robust,
    "ipo-mean": IpoMean,
    "hinge": Hinge,
    "simpo": Simpo,
    "nll-mean": NllMean,
    "kto": Kto,
}
"""All losses: the papers' first, then those of TRL under names of their own."""
