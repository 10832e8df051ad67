"""A batch of prompts: stops, lengths, and log-probabilities against one forward pass."""

from __future__ import annotations

import pytest
import torch

from koine.errors import UserError
from koine.generate import generate
from koine.generate.sampling import Sampling
from koine.model import Decoder, ModelConfig


def test_each_row_stops_alone_and_reports_the_models_log_probabilities(tiny: ModelConfig) -> None:
    model = Decoder(tiny).eval()
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (3, 17, 9)]
    free = generate(model, prompts, Sampling(max_new_tokens=20, temperature=0))
    assert [one.finish for one in free] == ["length"] * 3
    stop = free[1].tokens[6]
    stopped = generate(model, prompts, Sampling(max_new_tokens=20, temperature=0), stop_ids=(stop,))
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


def test_chunked_prefill_equals_one_prefill(tiny: ModelConfig) -> None:
    """Pieces shorter than the window and than one row's padding."""
    model = Decoder(tiny).eval()
    prompts = [torch.randint(6, 98, (length,)).tolist() for length in (31, 6)]
    sampling = Sampling(max_new_tokens=5, temperature=0)
    whole = [one.tokens for one in generate(model, prompts, sampling)]
    assert whole == [one.tokens for one in generate(model, prompts, sampling, prefill_chunk=4)]


def test_ids_beyond_the_vocabulary_are_refused(tiny: ModelConfig) -> None:
    with pytest.raises(UserError, match="holds id 99 and the model knows 99"):
        generate(Decoder(tiny), [[5, 99]], Sampling(temperature=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(
    tiny: ModelConfig, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Decoder(tiny).eval()
    monkeypatch.setattr(model, "logits", lambda hidden: torch.full((len(hidden), 99), torch.nan))
    with pytest.raises(UserError, match="no next token can be chosen"):
        generate(model, [[5, 7]], Sampling(temperature=temperature, seed=0))


def test_samples_depend_on_their_own_seed_only(tiny: ModelConfig) -> None:
    """A row's samples follow from its own seed; limits on the candidates hold; bad values are refused."""
    model = Decoder(tiny).eval()
    prompts = [[5, 9, 12], [5, 44]]
    free = Sampling(max_new_tokens=12, temperature=2.0, seed=4)

    def drawn(sampling: Sampling, which: list[list[int]]) -> list[list[int]]:
        return [one.tokens for one in generate(model, which, sampling)]

    both, again = drawn(free, prompts), drawn(free, prompts)
    assert both == again
    assert both[0] == drawn(free, prompts[:1])[0]
    greedy = drawn(Sampling(max_new_tokens=12, temperature=0), prompts)
    for limit in (
        Sampling(max_new_tokens=12, temperature=2.0, top_k=1, seed=0),
        Sampling(max_new_tokens=12, temperature=2.0, top_p=1e-6, seed=0),
        Sampling(max_new_tokens=12, temperature=2.0, min_p=1.0, seed=0),
    ):
        assert drawn(limit, prompts) == greedy
    with pytest.raises(UserError, match="top-p is 1.5"):
        Sampling(top_p=1.5)
    with pytest.raises(UserError, match="a prompt is empty"):
        drawn(free, [[]])
