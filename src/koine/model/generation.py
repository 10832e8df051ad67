"""Answers token by token: prefill, then one position a step, for a batch of prompts of any lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy. Raises `UserError` for values out of range."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, None),
            ("temperature", 0.0, None),
            ("top_k", 0, None),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if value < low or (high is not None and value > high) or (name == "top_p" and value == 0.0):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{name} is {value}", mend=f"it must be {limits}")
        if self.repetition_penalty <= 0.0:
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}", mend="it must be above 0 (1: none)"
            )


@dataclass(frozen=True)
class Step:
    """One step of a batch: per row the new token and its log-probability, `None` where the row has ended."""

    tokens: list[int | None]
    logprobs: list[float | None]


def candidates(logits: Tensor, sampling: Sampling, seen: Sequence[Sequence[int]]) -> Tensor:
    """The logits `[batch, vocab]` that a token is drawn from: penalised, tempered, `-inf` where a limit rules a token out.

    The limits apply in the order of `transformers` (top-k, top-p, min-p). Greedy choice applies the penalty alone.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        logits = logits.clone()
        for row, tokens in enumerate(seen):
            index = torch.tensor(sorted(set(tokens)), device=logits.device)
            scores = logits[row, index]
            logits[row, index] = torch.where(
                scores > 0, scores / sampling.repetition_penalty, scores * sampling.repetition_penalty
            )
    if sampling.temperature == 0.0:
        return logits
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        threshold = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # The token that crosses the threshold stays, so at least one does.
        drop = (probabilities.cumsum(dim=-1) - probabilities) >= sampling.top_p
        logits = logits.masked_fill(drop.gather(1, order.argsort(dim=-1)), -torch.inf)
    if sampling.min_p > 0.0:
        probabilities = logits.softmax(dim=-1)
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    return logits


def choose(
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: Sequence[Sequence[int]]
) -> Tensor:
    """The next token of each row, `[batch]`, from `logits` `[batch, vocab]`; one generator a row, so that a row's draw does not
    depend on its neighbours."""
    logits = candidates(logits, sampling, seen)
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    rows = [
        torch.multinomial(probabilities[row], 1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(rows)


@torch.inference_mode()
def stream(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    prefill_chunk: int = 2048,
) -> Iterator[Step]:
    """Yield a `Step` for each new position until every row has met a stop id or its limit.

    The stop id itself is the row's last token. Rows that have ended leave the batch. Raises `UserError` for an empty prompt.
    """
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty", mend="every prompt needs at least one token (BOS)")
    device = model.output_weight.device
    highest = max(max(prompt) for prompt in prompts)
    if highest >= model.config.vocab_size:
        raise UserError(
            f"a prompt holds id {highest} and the model knows {model.config.vocab_size}",
            mend="encode it with the model's own tokenizer",
        )
    longest = max(len(prompt) for prompt in prompts)
    pad = model.config.pad_token_id
    tokens = torch.tensor(
        [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    mask = torch.tensor(
        [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
    )
    cache = model.new_cache(len(prompts))
    cache.padding = (mask == 0).sum(dim=1)
    for start in range(0, longest, prefill_chunk):
        hidden = model(tokens[:, start : start + prefill_chunk], cache=cache)
    generators = [torch.Generator(device).manual_seed(sampling.seed + row) for row in range(len(prompts))]
    seen = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))
    stops = set(stop_ids)
    for count in range(1, sampling.max_new_tokens + 1):
        logits = model.logits(hidden[:, -1])
        chosen = choose(logits, sampling, [generators[row] for row in rows], [seen[row] for row in rows])
        logprobs = logits.float().log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
        new: list[int | None] = [None] * len(prompts)
        new_logprobs: list[float | None] = [None] * len(prompts)
        for row, token, logprob in zip(rows, chosen.tolist(), logprobs, strict=True):
            new[row], new_logprobs[row] = token, logprob
            seen[row].append(token)
        yield Step(new, new_logprobs)
        keep = [index for index, row in enumerate(rows) if seen[row][-1] not in stops]
        if not keep or count == sampling.max_new_tokens:
            return
        if len(keep) < len(rows):
            index = torch.tensor(keep, device=device)
            cache.select(index)
            chosen = chosen[index]
            rows = [rows[i] for i in keep]
        hidden = model(chosen[:, None], cache=cache)


def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, *, stop_ids: Sequence[int] = ()
) -> list[list[int]]:
    """The answers to a batch of prompts, each without its prompt and without the stop id."""
    answers: list[list[int]] = [[] for _ in prompts]
    for step in stream(model, prompts, sampling, stop_ids=stop_ids):
        for answer, token in zip(answers, step.tokens, strict=True):
            if token is not None and token not in stop_ids:
                answer.append(token)
    return answers
