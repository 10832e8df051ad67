"""Every loss that TRL has too, against TRL 1.16's own trainers, as `record_trl.py` recorded them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from koine.align.log_probabilities import LogProbabilities
from koine.align.loss_spec import LossSpec
from koine.align.loss_terms import LOSSES
from koine.align.losses import kto_reference_point
from koine.align.reward_losses import bradley_terry
from koine.data.groups import Group
from tests.align.groups import labelled, preferences, scored

RECORDED: dict[str, Any] = json.loads(Path(__file__).with_name("recorded_trl.json").read_text())
CASES: list[dict[str, Any]] = RECORDED["losses"]
TOLERANCE = {"atol": 1e-6, "rtol": 0}
NOT_IN_TRL = {"ipo", "slic", "nll", "srpo", "copg"}


def numbers(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def by_group(case: dict[str, Any], values: Tensor) -> Tensor:
    """Put TRL's order of pairs, all chosen ones before all rejected ones, into the order of groups."""
    return values.reshape(2, -1).T.flatten() if case["trainer"] in ("DPOTrainer", "CPOTrainer") else values


def groups_of(case: dict[str, Any]) -> list[Group]:
    if case["trainer"] == "KTOTrainer":
        return [labelled(label) for label in case["labels"]]
    if case["trainer"] == "RLOOTrainer":
        scores, k = case["scores"], case["completions"]
        return [scored(*scores[start : start + k]) for start in range(0, len(scores), k)]
    return [preferences()] * (len(case["policy"]) // 2)


@pytest.mark.parametrize("case", CASES, ids=[f"{case['trainer']}-{case['loss_spec']}" for case in CASES])
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any]) -> None:
    spec = LossSpec.parse(case["loss_spec"])
    sums = by_group(case, numbers(case["policy"])).requires_grad_()
    lengths = by_group(case, numbers(case["lengths"]))
    reference = by_group(case, numbers(case["reference"])) if "reference" in case else None
    z0 = None
    if "mismatched" in case:
        z0 = kto_reference_point(numbers(case["mismatched"]), numbers(case["mismatched_reference"]))
    behaviour = numbers(case["behaviour"]) if "behaviour" in case else None
    policy = LogProbabilities(sums, lengths)
    losses, _ = spec(policy, reference, groups_of(case), behaviour=behaviour, reference_point=z0)
    losses.mean().backward()
    torch.testing.assert_close(losses.mean().detach(), torch.tensor(case["loss"]).double(), **TOLERANCE)
    torch.testing.assert_close(sums.grad, by_group(case, numbers(case["gradient"])), **TOLERANCE)


def test_all_losses_of_trl_are_recorded() -> None:
    names = {term.name for case in CASES for term in LossSpec.parse(case["loss_spec"]).terms}
    assert names == set(LOSSES) - NOT_IN_TRL
    assert RECORDED["versions"]["trl"].startswith("1.16.")


def test_the_recorded_kl_of_kto_is_once_positive_and_once_clamped() -> None:
    kls = [
        (numbers(case["mismatched"]) - numbers(case["mismatched_reference"])).mean()
        for case in CASES
        if "mismatched" in case
    ]
    assert sorted(kl > 0 for kl in kls) == [False, True]


@pytest.mark.parametrize("case", RECORDED["rewards"])
def test_reward_loss_is_that_of_trl(case: dict[str, Any]) -> None:
    rewards = numbers(case["rewards"]).reshape(2, -1).T.clone().requires_grad_()
    margin = None if case["margin"] is None else numbers(case["margin"])
    centring = case["settings"]["center_rewards_coefficient"] or 0.0
    loss = bradley_terry(rewards, margin=margin, centring=centring).mean()
    loss.backward()
    assert rewards.grad is not None
    torch.testing.assert_close(loss.detach(), torch.tensor(case["loss"]).double(), **TOLERANCE)
    torch.testing.assert_close(rewards.grad.T.flatten(), numbers(case["gradient"]), **TOLERANCE)


def small_llama(phase: float) -> Any:
    """The model of `record_trl.py`, in float64."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**RECORDED["config"])
    model = transformers.LlamaForCausalLM(config).double()
    with torch.no_grad():
        for i, (name, weight) in enumerate(model.named_parameters()):
            if "norm" not in name:
                wave = 0.4 * torch.sin(1.7 * torch.arange(weight.numel(), dtype=torch.float64) + i + phase)
                # Weights of float32, as recorded.
                weight.copy_(wave.float().reshape(weight.shape))
    return model


def completion_sums(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of completions by `transformers`, padded rows, `[n]`."""
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :-1]
    found = F.log_softmax(logits, dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    return (found * mask[:, 1:]).sum(dim=1)


@pytest.mark.parametrize("case", RECORDED["model"], ids=lambda case: case["loss_spec"])
def test_gradients_of_all_weights_are_those_of_trl(case: dict[str, Any]) -> None:
    model, reference = small_llama(0.0), small_llama(0.5)
    # TRL puts all chosen ones first; ours go by group. A causal model needs no mask of padding on the right.
    order = by_group(case, torch.arange(len(case["tokens"])))
    tokens, mask = torch.tensor(case["tokens"])[order], torch.tensor(case["completion_mask"])[order]
    with torch.no_grad():
        reference_sums = completion_sums(reference, tokens, mask)
    policy = LogProbabilities(completion_sums(model, tokens, mask), mask.sum(dim=1).double())
    losses, _ = LossSpec.parse(case["loss_spec"])(
        policy, reference_sums, [preferences()] * (len(tokens) // 2)
    )
    losses.mean().backward()
    assert float(losses.mean().detach()) == pytest.approx(case["loss"], abs=1e-6)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad.flatten(), numbers(case["gradients"][name]), **TOLERANCE)
