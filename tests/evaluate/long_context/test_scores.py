"""Scores of a prompt: models that retrieve or not, and values by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koine.evaluate.log_likelihood import ScoringModel
from koine.evaluate.long_context.prompts import Material, Prompt
from koine.evaluate.long_context.scores import (
    SPARE_TOKENS,
    greedy_continuation,
    score_prompt,
    string_match,
)
from koine.evaluate.long_context.tasks import Cell, make_prompt
from koine.model import Decoder, ModelConfig, hybrid_layers
from koine.tokenizer import Tokenizer
from tests.evaluate.conftest import Uniform


class Induction(nn.Module):
    """Retrieves: predicts the token after the longest earlier match of the current suffix."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.zeros(*tokens.shape, 1)
        for row, ids in enumerate(tokens.tolist()):
            common: list[int] = []  # at each earlier place: how many tokens before it equal the last ones
            for end in range(1, len(ids) + 1):
                common = [0] + [
                    common[at - 1] + 1 if ids[at - 1] == ids[end - 1] else 0 for at in range(1, end)
                ]
                hidden[row, end - 1, 0] = ids[max(range(end), key=lambda at: (common[at], at))]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return 20.0 * nn.functional.one_hot(hidden[..., 0].long(), self.vocab_size).float()


@pytest.mark.parametrize(("task", "code"), [("single", "de"), ("multi-key", "ja"), ("multi-key-full", "en")])
def test_a_model_that_retrieves_and_one_that_does_not(
    words: Tokenizer, materials: dict[str, Material], task: str, code: str
) -> None:
    prompt = make_prompt(Cell(task, 256, 0.3, 0), seed=0, material=materials[code])
    knows: ScoringModel = Induction(words.vocab_size)
    score = score_prompt(knows, words, prompt)
    assert (score.score, score.exact) == (1.0, 1.0)
    assert score.logprob == pytest.approx(0.0, abs=1e-4)
    score = score_prompt(Uniform(words.vocab_size), words, prompt)
    assert (score.score, score.exact) == (0.0, 0.0)
    assert score.logprob == pytest.approx(-math.log(words.vocab_size), abs=1e-5)
    # Without the needle there is nothing to retrieve.
    (start, end), length = prompt.needles[0], len(prompt.tokens)
    blank = tuple(prompt.tokens[at] for at in range(length) if not start <= at < end)
    without = replace(prompt, tokens=blank, needles=())
    assert score_prompt(knows, words, without).score == 0.0


def test_strings_are_matched_as_ruler_does() -> None:
    assert string_match("They are 12, 34.", ["12", "34", "56", "78"]) == 0.5
    assert string_match("STRASSE", ["Straße"]) == 1.0
    assert string_match("b or c", ["a", "c"], any_of=True) == 1.0
    assert string_match("b", ["a", "c"], any_of=True) == 0.0


def test_greedy_answers_are_the_same_with_and_without_a_cache(words: Tokenizer) -> None:
    """Our decoder and a model of transformers through their caches, against the whole text at each step."""
    transformers = pytest.importorskip("transformers")
    from koine.model import CausalLM

    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=words.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        layers=hybrid_layers(4, window=8),
        initializer_range=0.2,
    )
    decoder = Decoder(config)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=words.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    ).eval()

    class Plain(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner_model = inner

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner_model(tokens)

        def logits(self, hidden: Tensor) -> Tensor:
            return self.inner_model.logits(hidden)

    prompt = torch.randint(10, words.vocab_size, (40,)).tolist()
    for model in (decoder, CausalLM(llama)):
        plain = greedy_continuation(Plain(model), prompt, 9, stops={words.eos_id})
        assert len(set(plain)) > 1
        assert greedy_continuation(model, prompt, 9, stops={words.eos_id}) == plain
        stop = plain[4]
        short = greedy_continuation(model, prompt, 9, stops={stop, words.eos_id})
        assert short == plain[: plain.index(stop)]


class Scripted(nn.Module):
    """Predicts a fixed token at each position: logit 2 for it, 0 for all others."""

    def __init__(self, script: dict[int, int], vocab_size: int) -> None:
        super().__init__()
        self.script, self.vocab_size = script, vocab_size

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])[None].expand(tokens.shape[0], -1)

    def logits(self, positions: Tensor) -> Tensor:
        table = torch.zeros(*positions.shape, self.vocab_size)
        for position, token in self.script.items():
            table[positions == position, token] = 2.0
        return table


def bare(tokens: tuple[int, ...], answer: tuple[int, ...], expected: tuple[str, ...]) -> Prompt:
    """A prompt of these tokens alone."""
    return Prompt("single", len(tokens), tokens, answer, expected, (), (), (0, 1), None)


def test_a_prompt_is_scored_by_hand(words: Tokenizer) -> None:
    """Scores of a right answer, of wrong first tokens, of a late and of a cut answer."""
    vocab = words.vocab_size
    answer = tuple(words.encode("Berlin"))[:3]
    assert len(answer) >= 2
    expected = words.decode(list(answer))
    prompt = bare((40, 41, 42, 43), answer, (expected,))
    other = next(token for token in range(60, vocab) if token not in answer)
    hit = 2.0 - math.log(math.exp(2.0) + vocab - 1)
    miss = -math.log(math.exp(2.0) + vocab - 1)
    right = {3 + at: token for at, token in enumerate(answer)}
    score = score_prompt(Scripted(right, vocab), words, prompt)
    assert (score.score, score.exact, score.written) == (1.0, 1.0, expected)
    assert score.logprob == pytest.approx(hit, rel=1e-5)
    # A wrong first token: not exact, and the other tokens are still conditioned on the right ones.
    late = {**right, 3: other}
    score = score_prompt(Scripted(late, vocab), words, prompt)
    assert score.exact == 0.0
    assert score.logprob == pytest.approx((miss + hit * (len(answer) - 1)) / len(answer), rel=1e-5)
    assert score.written.startswith(words.decode([other]))
    # One position late: the output contains the answer, but it is not exact.
    shifted = {4 + at: token for at, token in enumerate(answer)} | {3: other}
    score = score_prompt(Scripted(shifted, vocab), words, prompt)
    assert (score.score, score.exact) == (1.0, 0.0)
    # An output is cut SPARE_TOKENS beyond the length of the right answer.
    for late_by, found in ((SPARE_TOKENS, 1.0), (SPARE_TOKENS + 1, 0.0)):
        script = dict.fromkeys(range(3, 3 + late_by), other)
        script |= {3 + late_by + at: token for at, token in enumerate(answer)}
        assert score_prompt(Scripted(script, vocab), words, prompt).score == found, late_by
    # An output ends at a stop token.
    script = {3: other, 4: words.eos_id, **{5 + at: token for at, token in enumerate(answer)}}
    score = score_prompt(Scripted(script, vocab), words, prompt)
    assert (score.score, score.written) == (0.0, words.decode([other]))


def test_all_needles_or_any(words: Tokenizer) -> None:
    """The score is the share of four values; of alternatives one is enough."""
    vocab = words.vocab_size
    text = "12 34"
    answer = tuple(words.encode(text))
    prompt = bare((40, 41), answer, ("12", "34", "56", "78"))
    right = Scripted({1 + at: token for at, token in enumerate(answer)}, vocab)
    assert score_prompt(right, words, prompt).score == 0.5
    assert score_prompt(right, words, replace(prompt, any_of=True)).score == 1.0
    assert score_prompt(right, words, replace(prompt, expected=("56",), any_of=True)).score == 0.0
