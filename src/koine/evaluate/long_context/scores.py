"""How well a model answers one prompt: three scores, from the strictest to the most informative.

- `score`: the share of the expected strings that stand in the greedy answer, upper and lower case alike (RULER's; for questions 1 where any
  of them does);
- `exact`: 1 where every token of the right answer is the model's first choice, given the right tokens before it;
- `logprob`: the mean log-probability of the right answer's tokens, in nats: it tells models apart that never answer right.

Prompts are run one at a time, with logits at the positions of the answer alone.
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
"""An answer may be so much longer than the right one before it is cut."""


@dataclass(frozen=True)
class Score:
    """Of one prompt; `written` is the greedy answer."""

    score: float
    exact: float
    logprob: float
    written: str


def score_prompt(
    model: ScoringModel, tokenizer: Tokenizer, prompt: Prompt, *, device: torch.device | str = "cpu"
) -> Score:
    """Run the right answer through the model and, where it is not the greedy one, the model's own."""
    first, logprobs = answer_logprobs(model, prompt.tokens, prompt.answer, device=device)
    exact = first == list(prompt.answer)
    if exact:
        # The greedy answer begins with just these tokens.
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
    """The share of `expected` that stands in `text`; with `any_of` 1 or 0."""
    found = [answer.casefold() in text.casefold() for answer in expected]
    return float(any(found)) if any_of else sum(found) / len(found)


def answer_logprobs(
    model: ScoringModel, prompt: Sequence[int], answer: Sequence[int], *, device: torch.device | str = "cpu"
) -> tuple[list[int], list[float]]:
    """The model's first choice at each token of `answer`, and the log-probability (nats) of the token, given all before it."""
    tokens = torch.tensor([[*prompt, *answer[:-1]]], device=device)
    with evaluating(model):
        hidden = model(tokens)[:, len(prompt) - 1 :]
        logits = model.logits(hidden)[0].float()
        targets = torch.tensor([list(answer)], device=device)[0]
        logprobs: Tensor = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        return [int(token) for token in logits.argmax(dim=-1)], [float(value) for value in logprobs]


def greedy_continuation(
    model: Any,
    prompt: Sequence[int],
    count: int,
    *,
    stops: Collection[int],
    device: torch.device | str = "cpu",
) -> list[int]:
    """At most `count` tokens, without the stop token. Our decoder and models of `transformers` use their caches; any other model runs the whole
    text at each step."""
    from koine.generate import generate
    from koine.generate.sequential import SequentialGenerator
    from koine.generate.token_sampling import Sampling
    from koine.model import CausalLM, Decoder

    with evaluating(model):
        if isinstance(model, Decoder):
            sampling = Sampling(max_new_tokens=count)
            [answer] = generate(model, [list(prompt)], sampling, stop_ids=tuple(stops))
            return answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
        if isinstance(model, CausalLM):
            queue = SequentialGenerator(model)
            answer = queue.submit(list(prompt), Sampling(max_new_tokens=count), stop_ids=tuple(stops))
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
