"""Loss specifications: text, checks, groups of different sizes, metrics."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from koine.align import LossSpec
from koine.align.log_probabilities import LogProbabilities
from koine.align.loss_spec import Term
from koine.align.loss_terms import LOSSES, Copg, Dpo, Kto, LossInputs, Nll, Srpo
from koine.align.policy_losses import copg
from koine.data.groups import Group
from koine.errors import UserError
from tests.align.groups import labelled, preferences, scored
from tests.align.tabular import random


def policy_of(completions: int, *, seed: int = 0) -> LogProbabilities:
    return LogProbabilities(
        random(completions, seed=seed) - 4, torch.arange(1, completions + 1, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dpo", "dpo:beta=0.1"),
        ("dpo:beta=0.1+nll:weight=0.2", "dpo:beta=0.1+nll:weight=0.2"),
        (" dpo : beta = 1e-1 , label_smoothing=0.0 + nll : weight=1 ", "dpo:beta=0.1+nll"),
        ("ipo:tau=1e+3+nll-mean", "ipo:tau=1000+nll-mean"),
        ("srpo:alpha=0.25+dpo:weight=3,beta=2", "srpo:beta=0.1,alpha=0.25+dpo:beta=2,weight=3"),
        ("kto:undesirable_weight=1.25", "kto:beta=0.1,undesirable_weight=1.25"),
        ("slic:alpha=0.30000000000000004", "slic:alpha=0.30000000000000004"),
    ],
)
def test_text_and_canonical_text(text: str, canonical: str) -> None:
    spec = LossSpec.parse(text)
    assert str(spec) == canonical
    assert LossSpec.parse(canonical) == spec
    assert LossSpec.parse(canonical).identity() == spec.identity()


@pytest.mark.parametrize("name", LOSSES)
def test_every_parameter_is_read_from_text(name: str) -> None:
    for field in dataclasses.fields(LOSSES[name]):
        [term] = LossSpec.parse(f"{name}:{field.name}=0.375,weight=2").terms
        assert getattr(term.loss, field.name) == 0.375
        assert term.weight == 2
        assert term.loss != LOSSES[name]()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown loss ''"),
        ("dpoo", "unknown loss 'dpoo'; did you mean 'dpo'"),
        ("ipo_mean", "did you mean 'ipo-mean'"),
        ("dpo:bta=0.1", "'dpo' has no parameter 'bta'; did you mean 'beta'?"),
        ("dpo:tau=0.1", "'dpo' has no parameter 'tau'"),
        ("dpo:beta=0", "dpo: beta is 0.0; it must be greater than 0"),
        ("dpo:beta=-0.1", "dpo: beta is -0.1; it must be greater than 0"),
        ("ipo:tau=-1", "ipo: tau is -1.0; it must be greater than 0"),
        ("dpo:beta=nan", "dpo: beta is nan; it must be a number"),
        ("dpo:beta=inf", "dpo: beta is inf; it must be at most"),
        ("dpo:beta=x", "beta is 'x'; it must be a number"),
        ("dpo:beta", "'beta' is not key=value"),
        ("dpo:beta=1,beta=2", "'beta' is given twice"),
        ("dpo:label_smoothing=0.6", "it must be at most 0.5"),
        ("robust:label_smoothing=0.5", "it must be at most 0.49"),
        ("srpo:alpha=1.1", "it must be at most 1"),
        ("nll:weight=0", "nll: weight is 0.0; it must be greater than 0"),
        ("dpo+", "unknown loss ''"),
        ("dpo+dpo:beta=2", "the loss 'dpo' stands twice"),
        ("dpo+copg", "'dpo' takes preferences groups and 'copg' scored ones"),
        ("kto+nll", "'kto' takes labelled groups and 'nll' preferences ones"),
    ],
)
def test_wrong_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        LossSpec.parse(text)
    assert message in str(caught.value)
    assert "loss '" in str(caught.value)


def test_identity_tells_every_parameter_apart() -> None:
    base = LossSpec.parse("dpo:beta=0.1+nll:weight=0.2")
    for other in (
        "dpo:beta=0.1",
        "dpo:beta=0.2+nll:weight=0.2",
        "dpo:beta=0.1+nll:weight=0.3",
        "dpo:beta=0.1,label_smoothing=0.1+nll:weight=0.2",
        "dpo:beta=0.1+nll-mean:weight=0.2",
    ):
        assert LossSpec.parse(other).identity() != base.identity()
    assert base.identity() == {
        "dpo": {"weight": 1.0, "beta": 0.1, "label_smoothing": 0.0},
        "nll": {"weight": 0.2},
    }


@pytest.mark.parametrize(
    ("text", "groups", "completions", "fewest", "reference", "reference_point"),
    [
        ("dpo+nll", "preferences", 2, 2, True, False),
        ("nll", "preferences", 2, 2, False, False),
        ("simpo+nll-mean", "preferences", 2, 2, False, False),
        ("slic:alpha=0", "preferences", 2, 2, False, False),
        ("srpo", "preferences", 6, 6, True, False),
        ("dpo+srpo", "preferences", 6, 6, True, False),
        ("kto", "labelled", None, 1, True, True),
        ("copg", "scored", None, 2, True, False),
        ("rloo:beta=0", "scored", None, 2, False, False),
    ],
)
def test_what_a_loss_needs(
    text: str, groups: str, completions: int | None, fewest: int, reference: bool, reference_point: bool
) -> None:
    spec = LossSpec.parse(text)
    assert (spec.groups, spec.completions, spec.fewest_completions) == (groups, completions, fewest)
    assert (spec.needs_reference, spec.needs_reference_point) == (reference, reference_point)


def test_terms_are_added_with_their_weights() -> None:
    policy, reference = policy_of(6), random(6, seed=1) - 4
    groups = [preferences(), preferences(0.8), preferences(0.5)]
    loss, metrics = LossSpec.parse("dpo:beta=0.3+nll:weight=0.2")(policy, reference, groups)
    inputs = LossInputs(
        policy.sums.reshape(3, 2),
        policy.lengths.reshape(3, 2),
        reference.reshape(3, 2),
        probability=torch.tensor([1.0, 0.8, 0.5]).double(),
    )
    torch.testing.assert_close(loss, Dpo(beta=0.3)(inputs) + 0.2 * Nll()(inputs))
    torch.testing.assert_close(metrics["dpo_loss"], Dpo(beta=0.3)(inputs))
    torch.testing.assert_close(metrics["nll_loss"], Nll()(inputs))


def test_a_loss_of_pairs_takes_the_answers_of_srpo_groups() -> None:
    policy, reference, groups = policy_of(12), random(12, seed=1) - 4, [preferences(), preferences(0.7)]
    loss, _ = LossSpec.parse("srpo+dpo")(policy, reference, groups)
    srpo_loss, _ = LossSpec.parse("srpo")(policy, reference, groups)
    first = torch.tensor([0, 1, 6, 7])
    answers = LogProbabilities(policy.sums[first], policy.lengths[first])
    dpo_loss, _ = LossSpec.parse("dpo")(answers, reference[first], groups)
    torch.testing.assert_close(loss, srpo_loss + dpo_loss)


def test_groups_of_different_sizes_are_as_if_alone() -> None:
    groups = [scored(1, 2, 3), scored(0, 5), scored(2, 2, 1), scored(4, 3, 1, 0)]
    policy, reference = policy_of(12), random(12, seed=1) - 4
    sums = policy.sums.clone().requires_grad_()
    loss, metrics = LossSpec.parse("copg:beta=0.2")(policy._replace(sums=sums), reference, groups)
    loss.sum().backward()
    start = 0
    for i, group in enumerate(groups):
        span = slice(start, start + len(group.scores))
        start = span.stop
        one = policy.sums[span][None].clone().requires_grad_()
        scores = torch.tensor([group.scores]).double()
        alone = copg(one, reference[span][None], scores, beta=0.2)
        alone.sum().backward()
        torch.testing.assert_close(loss[i], alone[0])
        assert sums.grad is not None
        assert one.grad is not None
        torch.testing.assert_close(sums.grad[span], one.grad[0])
        assert float(metrics["score"][i]) == pytest.approx(sum(group.scores) / len(group.scores))
        means = policy.sums[span] / policy.lengths[span]
        torch.testing.assert_close(metrics["log_probability"][i], means.mean())
        torch.testing.assert_close(metrics["log_ratio"][i], (policy.sums[span] - reference[span]).mean())


def test_metrics_of_pairs_by_hand() -> None:
    policy = LogProbabilities(torch.tensor([-2.0, -6.0, -4.0, -4.0]), torch.tensor([2.0, 3.0, 1.0, 4.0]))
    reference = torch.tensor([-3.0, -6.5, -4.0, -4.0])
    loss, metrics = LossSpec.parse("dpo:beta=1")(policy, reference, [preferences(0.9), preferences(0.9)])
    assert metrics["log_probability_chosen"].tolist() == [-1.0, -4.0]
    assert metrics["log_probability_rejected"].tolist() == [-2.0, -1.0]
    assert metrics["margin"].tolist() == [0.5, 0.0]
    # 0.9 of the labels agree with the first one's sign; the second one prefers nothing.
    torch.testing.assert_close(metrics["accuracy"], torch.tensor([0.9, 0.5]))
    assert float(loss[1]) == pytest.approx(math.log(2))


def test_metrics_carry_no_gradient() -> None:
    policy = policy_of(4)
    sums = policy.sums.clone().requires_grad_()
    reference = random(4, seed=1)
    _, metrics = LossSpec.parse("dpo+nll")(policy._replace(sums=sums), reference, [preferences()] * 2)
    assert not any(metric.requires_grad for metric in metrics.values())
    assert {metric.shape for metric in metrics.values()} == {torch.Size([2])}


def test_a_batch_without_groups_has_no_loss() -> None:
    policy = LogProbabilities(torch.zeros(0, requires_grad=True), torch.zeros(0))
    loss, metrics = LossSpec.parse("nll")(policy, None, [])
    assert loss.shape == (0,)
    assert not metrics
    loss.sum().backward()


def test_kto_takes_the_reference_point_of_the_step() -> None:
    groups, policy, reference = [labelled(True), labelled(False, True)], policy_of(3), random(3, seed=1) - 4
    spec = LossSpec.parse("kto:beta=0.5")
    loss, _ = spec(policy, reference, groups, reference_point=0.3)
    inputs = LossInputs(policy.sums[None], policy.lengths[None], reference[None], reference_point=0.3)

    def alone(columns: list[int], labels: list[bool]) -> Tensor:
        return Kto(beta=0.5)(
            inputs._replace(
                policy=inputs.policy[:, columns],
                reference=reference[None][:, columns],
                labels=torch.tensor([labels]),
            )
        )

    torch.testing.assert_close(loss, torch.cat((alone([0], [True]), alone([1, 2], [False, True]))))
    with pytest.raises(ValueError, match="reference point"):
        spec(policy, reference, groups)


@pytest.mark.parametrize(
    ("text", "groups", "completions", "message"),
    [
        ("dpo", [scored(1, 2)], 2, "holds scored groups, and the loss 'dpo:beta=0.1' takes preferences ones"),
        (
            "copg",
            [preferences()],
            2,
            "tokenize records with `--kind scored`, or choose a loss of preferences",
        ),
        ("copg", [scored(1.0)], 1, "a group has 1 completion, and the loss 'copg:beta=0.1' takes at least 2"),
        ("rloo", [scored(1, 2), scored(1.0)], 3, "a group has 1 completion"),
        ("srpo", [preferences()], 2, "a group has 2 completions, and the loss 'srpo:beta=0.1' takes 6"),
    ],
)
def test_groups_that_a_loss_cannot_take_are_refused(
    text: str, groups: list[Group], completions: int, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        LossSpec.parse(text)(policy_of(completions), random(completions, seed=1), groups)
    assert message in str(caught.value)


def test_a_missing_reference_is_refused() -> None:
    with pytest.raises(UserError, match="needs a reference; use --reference start"):
        LossSpec.parse("dpo")(policy_of(2), None, [preferences()])
    LossSpec.parse("simpo")(policy_of(2), None, [preferences()])


def test_python_makes_the_same_specification() -> None:
    terms = (Term("dpo", Dpo(beta=0.2)), Term("nll", Nll(), weight=0.5))
    assert LossSpec(terms) == LossSpec.parse("dpo:beta=0.2+nll:weight=0.5")
    with pytest.raises(UserError, match="beta is -1"):
        Copg(beta=-1.0)
    with pytest.raises(UserError, match="weight is 0"):
        Term("srpo", Srpo(), weight=0.0)
    with pytest.raises(UserError, match="no term"):
        LossSpec(())
