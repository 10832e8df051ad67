"""How the next token is chosen from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from koine.errors import UserError
from koine.fields import check_integer, check_number

COLDEST = 1e-6
"""Below this temperature the likeliest token is taken. float32 logits of about 10 are 1e-6 apart, so that a colder draw could differ from
the likeliest token only where the model's own rounding decides, and the division by it leaves the range of float32 soon after."""

EXTREME = 1e20
"""A temperature or penalty further from 1 than this factor does what this one does; its product with a logit would overflow in float32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 (or below `COLDEST`) is greedy. Raises `UserError` for values out of range, NaN and
    infinity among them."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, low=1)
        check_integer("top_k", self.top_k, low=0)
        check_integer("seed", self.seed, low=0, high=2**63 - 1)
        check_number("temperature", self.temperature, low=0)
        check_number("top_p", self.top_p, above=0, high=1)
        check_number("min_p", self.min_p, low=0, high=1)
        check_number("repetition_penalty", self.repetition_penalty, above=0)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token (after the penalty) is taken, and nothing drawn."""
        return self.temperature < COLDEST

    @property
    def rule(self) -> tuple[float, int, float, float, float]:
        """What of the settings decides a draw: rows with an equal rule are drawn together."""
        return self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty


class NoTokenError(UserError):
    """No token can be chosen from these scores."""

    def __init__(self) -> None:
        super().__init__(
            "no next token can be chosen: the model's scores are NaN or infinite, or no token is allowed",
            hint="use the model in float32, or an earlier checkpoint",
        )


def candidates(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """The logits `[batch, vocab]` that a token is drawn from: penalised, tempered, `-inf` where a limit rules a token out.

    seen: `[batch, vocab]` bool, the tokens of each row's text so far; needed for a repetition penalty alone.
    The limits apply in the order of `transformers` (top-k, top-p, min-p). Greedy choice applies the penalty alone.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        assert seen is not None
        penalty = min(max(sampling.repetition_penalty, 1 / EXTREME), EXTREME)
        penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
        logits = torch.where(seen, penalised, logits)
    if sampling.greedy:
        return logits
    logits = logits / min(sampling.temperature, EXTREME)
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
    depend on its neighbours. `seen`: see `candidates`. Raises `NoTokenError` before anything is drawn where a row has nothing to draw from."""
    logits = candidates(logits, sampling, seen)
    if sampling.greedy:
        # Twice as fast on CPU as `argmax`, and the first of equal ones too.
        return logits.max(dim=-1).indices
    probabilities = logits.softmax(dim=-1)
    # Drawing from NaN would end a CUDA device's context, and every request with it.
    if not probabilities.sum(dim=-1).isfinite().all():
        raise NoTokenError
    rows = [
        torch.multinomial(probabilities[row], 1, generator=generator)
        for row, generator in enumerate(generators)
    ]
    return torch.cat(rows)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithm of each row's probability of its token, `[batch]`, from `logits` `[batch, vocab]` as the model gives them."""
    # One kernel over the vocabulary; `logsumexp` is five.
    return logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
