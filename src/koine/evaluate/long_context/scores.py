"""Scores of one prompt.

- `score`: share of the expected strings in the greedy output, ignoring case (RULER's; for questions, 1 where
  any is).
- `exact`: 1 where every token of the right answer is the argmax, given the right tokens before it.
- `logprob`: mean log-probability of the right answer's tokens, in nats. It also ranks models that never
  answer right.

Prompts run one at a time, with logits at the positions of the answer only.
Shape suffixes: b batch, t positions of the prompt, a tokens of the answer, h hidden size, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from koine.evaluate.log_likelihood import ScoringModel, evaluating

if TYPE_CHECKING:
    from koine.evaluate.long_context.prompts import Prompt
    from koine.tokenizer import Tokenizer

SPARE_TOKENS = 8
"""Tokens that an output may have beyond the length of the right answer."""


@dataclass(frozen=True)
class Score:
    """Scores of one prompt; `written` is the greedy output."""

    score: float
    exact: float
    logprob: float
    written: str


def score_prompt(
    model: ScoringModel, tokenizer: Tokenizer, prompt: Prompt, *, device: torch.device | str = "cpu"
) -> Score:
    """Score the right answer, and generate the model's own where it differs."""
    first, logprobs = answer_logprobs(model, prompt.tokens, prompt.answer, device=device)
    exact = first == list(prompt.answer)
    if exact:
        # The greedy output begins with these very tokens.
        written = list(prompt.answer)
    else:
        stops = {tokenizer.eos_id, tokenizer.end_of_turn_id, *getattr(model, "eos_ids", ())}
        written = greedy_continuation(
            model, prompt.tokens, len(prompt.answer) + SPARE_TOKENS, stops=stops, device=device
        )
    text = tokenizer.decode(written)
    return Score(
        score=string_match(text, prompt.expected, any_of=prompt.any_of),
        exact=float(exact),
        logprob=sum(logprobs) / len(logprobs),
        written=text,
    )


def string_match(text: str, expected: Sequence[str], *, any_of: bool = False) -> float:
    """Return the share of `expected` that `text` contains; with `any_of`, 1 or 0."""
    found = [answer.casefold() in text.casefold() for answer in expected]
    return float(any(found)) if any_of else sum(found) / len(found)


def answer_logprobs(
    model: ScoringModel, prompt: Sequence[int], answer: Sequence[int], *, device: torch.device | str = "cpu"
) -> tuple[list[int], list[float]]:
    """Return the argmax and the log-probability (nats) at each token of `answer`, given all before it."""
    tokens_bt = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    with evaluating(model):
        hidden_bah = model(tokens_bt)[:, len(prompt) - 1 :]
        logits_av = model.logits(hidden_bah)[0].float()
        targets_a = torch.tensor([list(answer)], device=device)[0]
        logprobs_a: Tensor = logits_av.log_softmax(dim=-1).gather(1, targets_a[:, None])[:, 0]
        return [int(token) for token in logits_av.argmax(dim=-1)], [float(value) for value in logprobs_a]


def greedy_continuation(
    model: Any,
    prompt: Sequence[int],
    count: int,
    *,
    stops: Collection[int],
    device: torch.device | str = "cpu",
) -> list[int]:
    """Generate at most `count` tokens greedily, without the stop token.

    Our decoder and models of `transformers` use their KV caches; any other model runs the whole text at each
    step.
    """
    from koine.generate import generate
    from koine.generate.sampling import Sampling
    from koine.generate.sequential import SequentialGenerator
    from koine.model import CausalLM, Decoder

    with evaluating(model):
        if isinstance(model, Decoder):
            sampling = Sampling(max_new_tokens=count, temperature=0)
            [answer] = generate(model, [list(prompt)], sampling, stop_ids=tuple(stops))
            return answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
        if isinstance(model, CausalLM):
            queue = SequentialGenerator(model)
            answer = queue.submit(
                list(prompt), Sampling(max_new_tokens=count, temperature=0), stop_ids=tuple(stops)
            )
            queue.run()
            written = answer.tokens
        else:
            tokens = torch.tensor([list(prompt)], device=device)
            written = []
            while len(written) < count and not (written and written[-1] in stops):
                chosen = model.logits(model(tokens)[:, -1]).argmax(dim=-1)
                written.append(int(chosen[0]))
                tokens = torch.cat((tokens, chosen[:, None]), dim=1)
    return written[:-1] if written and written[-1] in stops else written
