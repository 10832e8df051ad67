"""A prompt on its way to an answer, and the choice of the next token for several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from koine.errors import UserError
from koine.model.paged_cache import CachedSequence
from koine.model.sampling import Sampling, choose, log_probabilities

Finish = Literal["stop", "length", "cancelled"]


class TokenGrammar(Protocol):
    """Which tokens may come next in one text."""

    def mask(self) -> Tensor:
        """`[vocab]` bool: True where a token is allowed; at least one is."""
        ...

    def advance(self, token: int) -> None:
        """Take note of the chosen token."""
        ...


@dataclass(eq=False)
class Request:
    """A prompt and its answer; `tokens` and `log_probabilities` grow as it is written, `finish` says how it ended.

    stop_ids: tokens that end the answer (the one met is its last token).
    watch: called with each token that is no stop id; True ends the answer after it.
    grammar: restricts each token.
    """

    prompt: list[int]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    watch: Callable[[int], bool] | None = None
    grammar: TokenGrammar | None = None
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finish: Finish | None = None
    reused: int = 0
    """Tokens of the prompt that did not have to be read."""
    generator: torch.Generator | None = field(default=None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)
    """`[vocab]` bool, for a repetition penalty."""
    sequence: CachedSequence | None = field(default=None, repr=False)
    pause_at: int = field(default=0, repr=False)
    """Where reading stops once, because others begin alike."""

    @property
    def text(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.tokens

    def to_read(self) -> int:
        """Tokens of the text that the cache does not hold yet."""
        assert self.sequence is not None
        return len(self.prompt) + len(self.tokens) - self.sequence.length

    def take(self, token: int, log_probability: float) -> Finish | None:
        """Add a token; how the answer ends with it, or None where it goes on."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        if self.seen is not None:
            self.seen[token] = True
        if self.grammar is not None and token not in self.stop_ids:
            self.grammar.advance(token)
        if token in self.stop_ids or (self.watch is not None and self.watch(token)):
            return "stop"
        return "length" if len(self.tokens) == self.sampling.max_new_tokens else None


def new_request(
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    vocabulary: int,
    device: torch.device,
    stop_ids: Iterable[int] = (),
    watch: Callable[[int], bool] | None = None,
    grammar: TokenGrammar | None = None,
) -> Request:
    """A request with a generator of its own. Raises `UserError` for an empty prompt or an id outside the vocabulary."""
    if not prompt:
        raise UserError("a prompt is empty", mend="every prompt needs at least one token (BOS)")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = max(prompt) if max(prompt) >= vocabulary else min(prompt)
        raise UserError(
            f"a prompt holds id {wrong} and the model knows {vocabulary}",
            mend="encode it with the model's own tokenizer",
        )
    request = Request(list(prompt), sampling, frozenset(stop_ids), watch, grammar)
    request.generator = torch.Generator(device).manual_seed(sampling.seed)
    if sampling.repetition_penalty != 1.0:
        request.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        request.seen[torch.tensor(request.prompt, device=device)] = True
    return request


def choose_next(requests: Sequence[Request], logits: Tensor) -> list[tuple[int, float]]:
    """The next token of each request and its log-probability as the model gives it, from logits `[batch, vocab]`.

    Requests with equal settings are drawn together; each has a generator of its own, so that its draw does not depend on the others.
    """
    allowed = logits
    if any(request.grammar is not None for request in requests):
        allowed = logits.clone()
        for row, request in enumerate(requests):
            if request.grammar is not None:
                mask = request.grammar.mask().to(logits.device)
                # A model may have more rows than its tokenizer has ids.
                allowed[row, : mask.shape[0]].masked_fill_(~mask, -torch.inf)
                allowed[row, mask.shape[0] :] = -torch.inf
    rules: dict[object, list[int]] = {}
    for row, request in enumerate(requests):
        rules.setdefault(request.sampling.rule, []).append(row)
    chosen: Tensor | None = None
    for rows in rules.values():
        group = [requests[row] for row in rows]
        generators = [request.generator for request in group if request.generator is not None]
        seen = [request.seen for request in group if request.seen is not None]
        part = allowed if len(rows) == len(requests) else allowed[rows]
        drawn = choose(part, group[0].sampling, generators, torch.stack(seen) if seen else None)
        if len(rows) == len(requests):
            chosen = drawn
        else:
            chosen = (
                torch.empty(len(requests), dtype=torch.long, device=logits.device)
                if chosen is None
                else chosen
            )
            chosen[rows] = drawn
    assert chosen is not None
    return list(zip(chosen.tolist(), log_probabilities(logits, chosen).tolist(), strict=True))
