"""Losses against closed forms on a tabular policy of five answers, and their gradients by differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from koine.align.loss_terms import LOSSES, LossInputs, Slic, Srpo
from koine.align.losses import (
    dpo,
    hinge,
    ipo,
    ipo_mean,
    kto,
    kto_reference_point,
    nll,
    robust,
    simpo,
    slic,
)
from koine.align.policy_losses import copg, leave_one_out_advantages, rloo
from koine.align.reward_losses import bradley_terry
from koine.align.srpo import srpo, srpo_residuals
from tests.align.tabular import ANSWERS, minimise, ordered_pairs, pairs_of, random, reference

BETA = 0.3


def rewards() -> Tensor:
    return random(ANSWERS, seed=1)


def bradley_terry_labels(scale: float = 1.0) -> Tensor:
    """P(first is better) of all ordered pairs."""
    first, second = ordered_pairs()
    return torch.sigmoid(scale * (rewards()[first] - rewards()[second]))


def assert_smallest_at(loss: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    """Check that a loss of all pairs is smallest where the policy is `softmax(expected)`."""

    def of_logits(logits: Tensor) -> Tensor:
        return loss(pairs_of(torch.log_softmax(logits, 0))).mean()

    point = expected.clone().requires_grad_()
    [gradient] = torch.autograd.grad(of_logits(point), point)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)
    found = torch.log_softmax(minimise(of_logits, reference()), 0)
    # The square root of float64's precision: near its minimum a loss is flat.
    torch.testing.assert_close(found, torch.log_softmax(expected, 0), atol=1e-7, rtol=0)


def test_dpo_is_smallest_at_the_optimum_of_reward_with_kl() -> None:
    ref, labels = pairs_of(reference()), bradley_terry_labels()
    assert_smallest_at(lambda policy: dpo(policy, ref, labels, beta=BETA), reference() + rewards() / BETA)


def test_robust_dpo_finds_that_optimum_from_labels_of_which_a_share_is_wrong() -> None:
    flipped, ref, right = 0.2, pairs_of(reference()), bradley_terry_labels()
    noisy = (1 - flipped) * right + flipped * (1 - right)
    assert_smallest_at(
        lambda policy: robust(policy, ref, noisy, beta=BETA, label_smoothing=flipped),
        reference() + rewards() / BETA,
    )


def test_label_smoothing_is_another_probability() -> None:
    policy, labels = pairs_of(random(ANSWERS, seed=2)), bradley_terry_labels()
    smoothed = dpo(policy, pairs_of(reference()), labels, beta=BETA, label_smoothing=0.1)
    mixed = dpo(policy, pairs_of(reference()), 0.9 * labels + 0.1 * (1 - labels), beta=BETA)
    torch.testing.assert_close(smoothed, mixed, atol=1e-14, rtol=0)


def test_ipo_is_smallest_at_the_optimum_of_preference_with_kl() -> None:
    # With P = 1/2 + c * (r_first - r_second), `tau * D = P - 1/2` has a solution: pi_ref * exp(c * r / tau).
    first, second = ordered_pairs()
    slope = 0.4 / float(rewards().max() - rewards().min())
    labels = 0.5 + slope * (rewards()[first] - rewards()[second])
    ref = pairs_of(reference())
    assert_smallest_at(
        lambda policy: ipo(policy, ref, labels, tau=0.2), reference() + slope * rewards() / 0.2
    )


def test_ipo_mean_is_ipo_divided_by_the_square_of_its_strength() -> None:
    policy = pairs_of(random(ANSWERS, seed=2))
    ours = ipo_mean(policy, pairs_of(reference()), bradley_terry_labels(), beta=BETA)
    other = ipo(policy, pairs_of(reference()), bradley_terry_labels(), tau=BETA) / BETA**2
    torch.testing.assert_close(ours, other, atol=1e-12, rtol=1e-12)


def test_losses_by_hand() -> None:
    # log-ratios: 1.0 and -0.5, so D = 1.5.
    policy, ref = torch.tensor([[-1.0, -3.0]]).double(), torch.tensor([[-2.0, -2.5]]).double()

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    def close(loss: Tensor, expected: float) -> None:
        assert loss.shape == (1,)
        assert float(loss) == pytest.approx(expected, abs=1e-14)

    close(dpo(policy, ref, beta=0.4), -math.log(sigmoid(0.6)))
    close(ipo(policy, ref, tau=0.4), 0.1**2)
    close(hinge(policy, ref, beta=0.4), 0.4)
    close(hinge(policy, ref, beta=2.0), 0.0)
    close(simpo(policy, beta=0.5, gamma=0.3), -math.log(sigmoid(0.7)))
    close(nll(policy), 1.0)
    # The first term has no reference: 1 - (-1 + 3) < 0. The second: log(1 + e^(1 - 1)).
    close(slic(policy, ref, alpha=0.7), 0.7 * math.log(2))
    close(slic(policy, None, alpha=0.0, gamma=2.5), 0.5)
    labels = torch.tensor([[True, False]])
    desired, undesired = 1 - sigmoid(0.4 * (1.0 - 0.2)), 1 - sigmoid(0.4 * (0.2 + 0.5))
    close(
        kto(policy, ref, labels, 0.2, beta=0.4, desirable_weight=1.5, undesirable_weight=0.5),
        (1.5 * desired + 0.5 * undesired) / 2,
    )
    assert float(kto_reference_point(policy, ref)) == pytest.approx(0.25)
    assert float(kto_reference_point(ref, policy)) == 0.0
    assert not kto_reference_point(policy.requires_grad_(), ref).requires_grad


def test_srpo_identities_hold_at_its_optimum() -> None:
    beta, better = 0.3, torch.full((ANSWERS, ANSWERS), 0.5, dtype=torch.float64)
    first, second = ordered_pairs()
    better[first, second] = bradley_terry_labels()  # P(first is better than second)
    # Not Bradley-Terry: SRPO needs no model of rewards.
    better[0, 1], better[1, 0] = 0.9, 0.1
    revision_reference = torch.log_softmax(random(ANSWERS, ANSWERS, seed=3), dim=1)  # [shown, answer]
    tilted = revision_reference + better.T / beta  # P(answer is better than shown)
    log_z = torch.logsumexp(tilted, dim=1)
    revision = tilted - log_z[:, None]
    policy = torch.log_softmax(reference() - log_z, 0)

    def six(answers: Tensor, revisions: Tensor) -> Tensor:
        w, l = first, second  # noqa: E741  (the papers' names)
        columns = (answers[w], answers[l], revisions[w, w], revisions[w, l], revisions[l, w], revisions[l, l])
        return torch.stack(columns, dim=1)

    at_optimum, ref = six(policy, revision), six(reference(), revision_reference)
    for residual in srpo_residuals(at_optimum, ref, better[first, second], beta=beta):
        torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-12, rtol=0)
    loss = srpo(at_optimum, ref, better[first, second], alpha=0.3, beta=beta)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=1e-12, rtol=0)


def test_srpo_takes_the_mean_of_both_directions_of_a_pair() -> None:
    policy, ref, p = random(7, 6, seed=4), random(7, 6, seed=5), torch.rand(7, dtype=torch.float64)
    other_way = [1, 0, 5, 4, 3, 2]
    for alpha in (0.0, 0.4, 1.0):
        loss = srpo(policy, ref, p, alpha=alpha, beta=BETA)
        swapped = srpo(policy[:, other_way], ref[:, other_way], 1 - p, alpha=alpha, beta=BETA)
        torch.testing.assert_close(loss, swapped, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_copg_on_policy_gradient_is_that_of_rloo(k: int) -> None:
    policy, scores = random(6, k, seed=6), random(6, k, seed=7)
    others = (scores.sum(dim=1, keepdim=True) - scores) / (k - 1)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        point = policy.clone().requires_grad_()
        loss(point).sum().backward()
        assert point.grad is not None
        return point.grad

    contrastive = gradient(lambda point: copg(point, policy, scores, beta=BETA))
    torch.testing.assert_close(contrastive, -2 * BETA * (scores - others), atol=1e-13, rtol=0)
    # RLOO's loss is a mean over the k completions.
    reinforce = gradient(lambda point: rloo(point, policy, scores, beta=BETA))
    torch.testing.assert_close(contrastive, 2 * BETA * k * reinforce, atol=1e-13, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_copg_is_a_sum_over_pairs(k: int) -> None:
    policy, ref, scores = random(4, k, seed=8), random(4, k, seed=9), random(4, k, seed=10)
    regularised = scores - BETA * (policy - ref)
    pairs = sum((regularised[:, i] - regularised[:, j]).square() for i in range(k) for j in range(i))
    loss = copg(policy, ref, scores, beta=BETA)
    torch.testing.assert_close(loss, pairs / (k - 1), atol=1e-12, rtol=1e-12)


def test_copg_is_zero_at_the_optimum_of_reward_with_kl() -> None:
    best = torch.log_softmax(reference() + rewards() / BETA, 0)[None]
    assert float(copg(best, reference()[None], rewards()[None], beta=BETA)) == pytest.approx(0, abs=1e-20)


def test_rloo_estimates_the_gradient_of_reward_with_kl() -> None:
    # The expectation over all pairs of draws is the exact gradient of E[R] - beta * KL, the loss's negative.
    logits = random(ANSWERS, seed=11).requires_grad_()
    policy = torch.log_softmax(logits, 0)
    objective = (policy.exp() * (rewards() - BETA * (policy - reference()))).sum()
    [exact] = torch.autograd.grad(objective, logits, retain_graph=True)
    draws = torch.cartesian_prod(torch.arange(ANSWERS), torch.arange(ANSWERS))
    probability = policy.detach()[draws].sum(dim=1).exp()
    loss = rloo(policy[draws], reference()[draws], rewards()[draws], beta=BETA)
    [estimated] = torch.autograd.grad((probability * loss).sum(), logits)
    torch.testing.assert_close(-estimated, exact, atol=1e-13, rtol=0)


def test_rloo_clips_what_a_step_may_change() -> None:
    behaviour, scores = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[1.0, 0.0]]).double()
    moved = torch.tensor([[0.5, 0.5]], dtype=torch.float64, requires_grad=True)
    rloo(moved, None, scores, behaviour, beta=0.0, clip=0.2).sum().backward()
    assert moved.grad is not None
    # The better one has already become likelier by more than clip; the worse one may still be lowered.
    assert moved.grad[0, 0] == 0
    assert float(moved.grad[0, 1]) == pytest.approx(math.exp(0.5) / 2)


def test_advantages_leave_one_out() -> None:
    found = leave_one_out_advantages(torch.tensor([[1.0, 2.0, 6.0]]))
    torch.testing.assert_close(found, torch.tensor([[-3.0, -1.5, 4.5]]))


def test_bradley_terry_finds_the_log_odds_of_soft_labels() -> None:
    labels = torch.tensor([0.999, 0.7, 0.5]).double()

    def gap(**arguments: Tensor) -> Tensor:
        start = torch.zeros(3, 2, dtype=torch.float64)
        found = minimise(lambda point: bradley_terry(point, labels, **arguments).sum(), start)
        return found[:, 0] - found[:, 1]

    log_odds = torch.log(labels / (1 - labels))
    torch.testing.assert_close(gap(), log_odds, atol=1e-6, rtol=0)
    margin = torch.tensor([0.5, 0.2, 0.0]).double()
    torch.testing.assert_close(gap(margin=margin), log_odds + margin, atol=1e-6, rtol=0)


def test_centring_moves_rewards_to_zero() -> None:
    start = torch.tensor([[5.0, 4.0]], dtype=torch.float64)
    found = minimise(
        lambda point: bradley_terry(point, torch.tensor([0.7]).double(), centring=0.1).sum(), start
    )
    assert float(found.sum()) == pytest.approx(0, abs=1e-6)


def inputs_of(name: str, *, seed: int, dtype: torch.dtype = torch.float64) -> LossInputs:
    """Inputs of five groups for a loss of the table."""
    loss = LOSSES[name]()
    shape = (5, loss.completions or 3)
    numbers = [random(*shape, seed=seed + i).to(dtype) for i in range(4)]
    return LossInputs(
        policy=numbers[0] - 4,
        lengths=torch.arange(1, shape[0] * shape[1] + 1).reshape(shape).to(dtype),
        reference=numbers[1] - 4,
        probability=torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
            dtype
        ),
        labels=numbers[2] > 0,
        scores=numbers[2],
        behaviour=numbers[0] - 4 + 0.02 * numbers[3],
        reference_point=0.1,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_differences(name: str) -> None:
    inputs, loss = inputs_of(name, seed=20), LOSSES[name]()
    if name == "rloo":
        # The advantage is a constant of the gradient, also where it is made of `policy`.
        assert inputs.behaviour is not None
    policy = inputs.policy.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda point: loss(inputs._replace(policy=point)), (policy,))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_has_one_value_a_group_in_the_dtype_of_the_policy(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES[name]()(inputs_of(name, seed=30, dtype=dtype))
    assert loss.shape == (5,)
    assert loss.dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_the_reference_exactly_where_it_says_so(name: str) -> None:
    inputs, loss = inputs_of(name, seed=40), LOSSES[name]()
    assert inputs.reference is not None
    moved = loss(inputs._replace(reference=inputs.reference + random(*inputs.reference.shape, seed=41)))
    assert loss.needs_reference == (not torch.equal(moved, loss(inputs)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_takes_sums_or_means_as_it_says(name: str) -> None:
    inputs, loss = inputs_of(name, seed=50), LOSSES[name]()
    doubled = loss(inputs._replace(lengths=2 * inputs.lengths))
    assert (loss.takes == "means") == (not torch.equal(doubled, loss(inputs)))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.completions == 2])
def test_a_probability_is_the_expectation_over_the_label(name: str) -> None:
    inputs, loss = inputs_of(name, seed=60), LOSSES[name]()
    swap = [1, 0]
    assert inputs.reference is not None
    swapped = inputs._replace(
        policy=inputs.policy[:, swap],
        lengths=inputs.lengths[:, swap],
        reference=inputs.reference[:, swap],
        probability=None,
    )
    p = inputs.probability
    assert p is not None
    expected = p * loss(inputs._replace(probability=None)) + (1 - p) * loss(swapped)
    torch.testing.assert_close(loss(inputs), expected, atol=1e-12, rtol=0)


def test_srpo_on_a_tie_asks_for_no_preference() -> None:
    inputs = inputs_of("srpo", seed=70)
    tie = inputs._replace(reference=inputs.policy, probability=torch.full((5,), 0.5, dtype=torch.float64))
    assert torch.count_nonzero(Srpo()(tie)) == 0


def test_slic_without_regulariser_needs_no_reference() -> None:
    inputs = inputs_of("slic", seed=80)
    loss = Slic(alpha=0.0)
    assert not loss.needs_reference
    assert torch.equal(loss(inputs._replace(reference=None)), loss(inputs))


def test_every_parameter_changes_its_loss() -> None:
    for name, kind in LOSSES.items():
        inputs = inputs_of(name, seed=90)
        if name == "rloo":
            assert inputs.behaviour is not None
            inputs = inputs._replace(behaviour=inputs.policy - random(5, 3, seed=94))
        for field in dataclasses.fields(kind):
            changed = kind(**{field.name: 0.37})
            assert not torch.equal(changed(inputs), kind()(inputs)), (name, field.name)
