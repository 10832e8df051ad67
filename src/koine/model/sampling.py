"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from koine.errors import UserError


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

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with nothing that changes which one that is."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0

    @property
    def rule(self) -> tuple[float, int, float, float, float]:
        """What of the settings decides a draw: rows with an equal rule are drawn together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


def candidates(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The logits `[batch, vocab]` that a token is drawn from: penalised, tempered, `-inf` where a limit rules a token out.

    seen: `[batch, vocab]` bool, the tokens of each row's text so far; needed for a repetition penalty alone.
    The limits apply in the order of `transformers` (top-k, top-p, min-p). Greedy choice applies the penalty alone.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
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
    logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], seen: Tensor | None = None
) -> Tensor:
    """The next token of each row, `[batch]`, from `logits` `[batch, vocab]`; one generator a row, so that a row's draw does not
    depend on its neighbours. `seen`: see `candidates`."""
    logits = candidates(logits, sampling, seen)
    if sampling.temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = logits.softmax(dim=-1)
    rows = [
        torch.multinomial(probabilities[row], 1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(rows)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithm of each row's probability of its token, `[batch]`, from `logits` `[batch, vocab]` as the model gives them."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
