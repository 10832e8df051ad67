"""Filtered logits are those of the processors of `transformers`, and draws follow the probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koine.generate.sampling import Sampling
from koine.generate.token_sampling import candidates, choose


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 0.9, "repetition_penalty": 1.7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 0.6},
    ],
)
def test_candidates_are_those_of_transformers(settings: dict[str, Any]) -> None:
    logits_process = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(4, 50)
    seen = torch.randint(0, 50, (4, 9))
    names = [
        ("repetition_penalty", "RepetitionPenaltyLogitsProcessor"),
        ("temperature", "TemperatureLogitsWarper"),
        ("top_k", "TopKLogitsWarper"),
        ("top_p", "TopPLogitsWarper"),
        ("min_p", "MinPLogitsWarper"),
    ]
    expected = logits
    for name, processor in names:
        if name in settings:
            expected = getattr(logits_process, processor)(settings[name])(seen, expected)
    met = torch.zeros(4, 50, dtype=torch.bool).scatter_(1, seen, True)
    ours = candidates(logits, Sampling(**settings), met)
    assert torch.equal(ours.isinf(), expected.isinf())
    assert torch.allclose(ours, expected)


def test_samples_follow_the_probabilities() -> None:
    """2,000 samples of four tokens: each share is within four standard errors (at most 4.5 %)."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 2_000
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = choose(
        probabilities.log().expand(count, 4),
        Sampling(temperature=1.0, seed=0),
        generators,
    )
    shares = torch.bincount(drawn, minlength=4) / count
    errors = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() <= 4 * errors).all()


@pytest.mark.parametrize("penalty", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30, 1e300])
def test_extreme_settings_still_sample(temperature: float, penalty: float) -> None:
    """Of a grammar's two allowed tokens, and the likeliest where the temperature is next to 0."""
    logits = 10 * torch.randn(3, 40)
    logits[:, 2:] = -torch.inf
    seen = torch.rand(3, 40) < 0.5
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty, seed=0)
    chosen = choose(logits, sampling, [torch.Generator().manual_seed(row) for row in range(3)], seen)
    assert (chosen < 2).all()
    if temperature <= 1e-6:
        coldest = candidates(logits, Sampling(repetition_penalty=penalty, temperature=0), seen)
        assert torch.equal(chosen, coldest.argmax(-1))
