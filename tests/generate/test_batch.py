"""Sampling against the processors of `transformers`; batches, stops, log-probabilities against whole forward passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koine.errors import UserError
from koine.generate import generate
from koine.generate.token_sampling import Sampling, candidates, choose
from koine.model import Decoder, ModelConfig


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


def test_draws_follow_the_probabilities() -> None:
    """2,000 draws from four tokens: each share within four standard errors (at most 4.5 %) of its probability."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    count = 2_000
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    drawn = choose(
        probabilities.log().expand(count, 4),
        Sampling(temperature=1.0),
        generators,
    )
    shares = torch.bincount(drawn, minlength=4) / count
    errors = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((shares - probabilities).abs() <= 4 * errors).all()


def test_each_row_stops_alone_and_reports_the_models_log_probabilities(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (3, 17, 9)]
    free = generate(model, prompts, Sampling(max_new_tokens=20))
    assert [one.finish for one in free] == ["length"] * 3
    stop = free[1].tokens[6]
    stopped = generate(model, prompts, Sampling(max_new_tokens=20), stop_ids=(stop,))
    assert stopped[1].finish == "stop"
    for prompt, answer, got in zip(prompts, free, stopped, strict=True):
        whole_answer = answer.tokens
        expected = whole_answer[: whole_answer.index(stop) + 1] if stop in whole_answer else whole_answer
        assert got.tokens == expected
        with torch.no_grad():
            whole = model.logits(model(torch.tensor([prompt + expected])))[0].log_softmax(-1)
        for place, (token, logprob) in enumerate(zip(expected, got.log_probabilities, strict=True)):
            # float32, read with a cache in place of at once.
            assert abs(logprob - float(whole[len(prompt) - 1 + place, token])) < 1e-4


def test_a_prompt_read_in_pieces_is_the_prompt(tiny: ModelConfig) -> None:
    """Pieces shorter than the window and than one row's padding."""
    model = Decoder(tiny).eval()
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (31, 6)]
    sampling = Sampling(max_new_tokens=5)
    whole = [one.tokens for one in generate(model, prompts, sampling)]
    assert whole == [one.tokens for one in generate(model, prompts, sampling, prefill_chunk=4)]


def test_ids_beyond_the_vocabulary_are_refused(tiny: ModelConfig) -> None:
    with pytest.raises(UserError, match="holds id 99 and the model knows 99"):
        generate(Decoder(tiny), [[5, 99]], Sampling())


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_settings_that_are_no_numbers_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}; it must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize("penalty", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30, 1e300])
def test_settings_at_the_edge_of_floats_still_choose(temperature: float, penalty: float) -> None:
    """Of a grammar's two allowed tokens, and the likeliest where the temperature is next to 0."""
    logits = 10 * torch.randn(3, 40)
    logits[:, 2:] = -torch.inf
    seen = torch.rand(3, 40) < 0.5
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    chosen = choose(logits, sampling, [torch.Generator().manual_seed(row) for row in range(3)], seen)
    assert (chosen < 2).all()
    if temperature <= 1e-6:
        coldest = candidates(logits, Sampling(repetition_penalty=penalty), seen)
        assert torch.equal(chosen, coldest.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_are_told(
    tiny: ModelConfig, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Decoder(tiny).eval()
    monkeypatch.setattr(model, "logits", lambda hidden: torch.full((len(hidden), 99), torch.nan))
    with pytest.raises(UserError, match="no next token can be chosen"):
        generate(model, [[5, 7]], Sampling(temperature=temperature))


def test_draws_depend_on_their_own_seed_alone(tiny: ModelConfig) -> None:
    """A row's draw follows from its own seed alone; limits on the candidates hold; bad values are refused."""
    model = Decoder(tiny).eval()
    prompts = [[5, 9, 12], [5, 44]]
    free = Sampling(max_new_tokens=12, temperature=2.0, seed=4)

    def drawn(sampling: Sampling, which: list[list[int]]) -> list[list[int]]:
        return [one.tokens for one in generate(model, which, sampling)]

    both, again = drawn(free, prompts), drawn(free, prompts)
    assert both == again
    assert both[0] == drawn(free, prompts[:1])[0]
    greedy = drawn(Sampling(max_new_tokens=12), prompts)
    for limit in (
        Sampling(max_new_tokens=12, temperature=2.0, top_k=1),
        Sampling(max_new_tokens=12, temperature=2.0, top_p=1e-6),
        Sampling(max_new_tokens=12, temperature=2.0, min_p=1.0),
    ):
        assert drawn(limit, prompts) == greedy
    with pytest.raises(UserError, match="top_p is 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(UserError, match="a prompt is empty"):
        drawn(free, [[]])
