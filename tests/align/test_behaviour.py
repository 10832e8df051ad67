"""Figures of a policy's behaviour against closed forms, SciPy's definitions written out, and NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from koine.align.behaviour import (
    direction,
    divergence,
    expectation_adjusted_distinct,
    repetition,
    top_tokens,
    worst_language,
)


def test_uniform_logits_have_the_entropy_of_ten_tokens() -> None:
    """Over 40 equal tokens: log2 10 bits renormalised, a quarter of log2 40 raw, mass a quarter."""
    found = top_tokens(torch.zeros(3, 40))
    assert found.entropy.tolist() == pytest.approx([math.log2(10)] * 3, abs=1e-6)
    assert found.raw_entropy.tolist() == pytest.approx([math.log2(40) / 4] * 3, abs=1e-6)
    assert found.mass.tolist() == pytest.approx([0.25] * 3, abs=1e-6)


def test_a_certain_token_has_no_entropy() -> None:
    found = top_tokens(torch.tensor([[0.0, 200.0] + [0.0] * 30]))
    assert found.entropy.item() == found.raw_entropy.item() == 0.0
    assert found.mass.item() == 1.0


def test_entropy_and_mass_of_known_probabilities() -> None:
    """Halves, quarters and so on: sum i 2^-i bits for the first ten; the other tokens share the rest."""
    p = torch.tensor([2.0**-i for i in range(1, 11)] + [2.0**-10 / 64] * 64)
    found = top_tokens(p.log()[torch.randperm(len(p))][None])
    raw = sum(i * 2.0**-i for i in range(1, 11))
    mass = 1 - 2.0**-10
    assert found.raw_entropy.item() == pytest.approx(raw, abs=1e-6)
    assert found.mass.item() == pytest.approx(mass, abs=1e-6)
    assert found.entropy.item() == pytest.approx(raw / mass + math.log2(mass), abs=1e-6)


def test_fewer_tokens_than_ten_are_all_taken() -> None:
    assert top_tokens(torch.zeros(1, 4)).entropy.item() == pytest.approx(2.0, abs=1e-6)


def test_divergence_is_the_sum_over_the_vocabulary() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(5, 30)), generator.normal(size=(5, 30))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    wanted = (p * np.log(p / q)).sum(axis=1)
    found = divergence(torch.tensor(a), torch.tensor(b))
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)
    assert divergence(torch.tensor(a), torch.tensor(a)).abs().max() < 1e-7


def test_divergence_is_the_mean_of_log_ratios_of_samples() -> None:
    """The estimator from sampled tokens has the same mean, and needs many samples for it."""
    torch.manual_seed(0)
    policy, reference = torch.randn(1, 12), torch.randn(1, 12)
    drawn = torch.multinomial(policy.softmax(-1)[0], 400_000, replacement=True)
    ratios = policy.log_softmax(-1)[0, drawn] - reference.log_softmax(-1)[0, drawn]
    assert divergence(policy, reference).item() == pytest.approx(ratios.mean().item(), abs=5e-3)


@pytest.mark.parametrize("vocabulary", [2, 50, 250_000])
def test_ead_is_its_formula(vocabulary: int) -> None:
    texts = [[1, 2, 1, 2, 3], [1, 2], [4]]
    # Bigrams: 12 21 12 23, 12: five, three distinct. None crosses from one text into the next.
    expected = vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** 5)
    assert expectation_adjusted_distinct(texts, 2, vocabulary) == pytest.approx(3 / expected, rel=1e-9)
    assert expectation_adjusted_distinct(texts, 5, vocabulary) == pytest.approx(1.0, rel=1e-9)
    assert expectation_adjusted_distinct(texts, 6, vocabulary) == 0.0


def test_ead_of_random_tokens_is_one() -> None:
    """The expectation that it divides by is that of uniform draws, whatever their number."""
    generator = np.random.default_rng(0)
    for count in (100, 1_000, 10_000):
        text = generator.integers(0, 500, size=count).tolist()
        assert expectation_adjusted_distinct([text], 1, 500) == pytest.approx(1.0, abs=0.06)


def test_repetition() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)
    # abcd bcda cdab dabc abcd: the fifth 4-gram is the first again.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(0.2)


def test_the_worst_language_depends_on_the_direction() -> None:
    values = {"de": 0.2, "hi": 0.5, "en": 0.1}
    assert worst_language(values, "accuracy") == "en"
    assert worst_language(values, "kl") == "hi"
    assert worst_language(values, "reward/length") == "en"
    assert worst_language(values, "entropy") is None
    assert worst_language({"de": 0.2}, "kl") is None
    assert [direction(name) for name in ("margin/hi", "error", "ead")] == [1, -1, 0]
