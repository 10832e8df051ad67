"""Sampling from a model in training: the right tokens, and a model that trains on as if nothing had been."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koine.align.own_samples import sample_completions
from koine.align.sampler import inference_copy
from koine.errors import UserError
from koine.generate.sampling import Sampling
from koine.model.lora.adapter import add_lora
from koine.model.lora.config import LoraConfig

from . import policies

PROMPTS = [prompt.tokens for prompt in policies.prompts()]


def by_hand(model: Any, prompt: tuple[int, ...], count: int, stop: int) -> list[int]:
    """Greedy decoding without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens]))[:, -1]).argmax()))
        if tokens[-1] == stop:
            break
    return tokens[len(prompt) :]


def with_adapter() -> Any:
    model = policies.policy()
    add_lora(model, LoraConfig(rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.adapter.parameters:  # type: ignore[union-attr]
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("build", [policies.policy, policies.llama, with_adapter])
def test_greedy_samples_are_those_of_decoding_without_a_cache(build: Any) -> None:
    model = build()
    with torch.no_grad():
        first = by_hand(model, PROMPTS[0], 6, -1)
        stop = first[3]
        wanted = [by_hand(model, prompt, 12, stop) for prompt in PROMPTS]
    found = sample_completions(
        model, PROMPTS, Sampling(temperature=0, seed=0, max_new_tokens=12), stop_ids=[stop]
    )
    assert [list(sample.tokens) for sample in found] == wanted
    assert [sample.stopped for sample in found] == [tokens[-1] == stop for tokens in wanted]
    assert found[0].stopped


def test_a_sample_does_not_depend_on_the_batch() -> None:
    model, sampling = policies.policy(), Sampling(temperature=1.0, seed=5, max_new_tokens=20)
    assert sample_completions(model, PROMPTS, sampling) == sample_completions(
        model, PROMPTS, sampling, max_batch=2
    )
    again = sample_completions(policies.policy(seed=1), PROMPTS, sampling)
    assert again != sample_completions(model, PROMPTS, sampling)


@pytest.mark.parametrize("build", [policies.policy, policies.llama, with_adapter])
def test_training_goes_on_as_if_nothing_was_sampled(build: Any) -> None:
    def gradients(*, sample: bool) -> list[torch.Tensor]:
        model = build().train()
        tokens = torch.arange(40).view(2, 20)
        for _ in range(2):
            model.logits(model(tokens)).square().mean().backward()
            if sample:
                model.eval()
                sample_completions(model, PROMPTS, Sampling(seed=0, max_new_tokens=5))
                model.train()
        return [one.grad for one in model.parameters() if one.grad is not None]

    untouched, touched = gradients(sample=False), gradients(sample=True)
    assert len(untouched) == len(touched) > 0
    assert all(map(torch.equal, untouched, touched))


def test_the_copy_learns_nothing() -> None:
    model = policies.policy()
    copied = inference_copy(model)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_completion_ends_with_the_context() -> None:
    model = policies.llama()
    prompt = [5] * 250
    [sample] = sample_completions(model, [prompt], Sampling(seed=0, max_new_tokens=50))
    assert len(sample.tokens) == 6
    with pytest.raises(UserError, match="prompt 1 has 256 tokens, and the model's context holds 256"):
        sample_completions(model, [[5] * 256], Sampling(seed=0))
