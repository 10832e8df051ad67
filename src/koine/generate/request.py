"""A prompt on its way to an answer, and the choice of the next token for several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate.cache.paged_cache import CachedSequence
from koine.generate.sampling import Sampling, fresh_seed
from koine.generate.token_sampling import NoTokenError, choose, log_probabilities

Finish = Literal["stop", "length", "cancelled", "failed"]


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
    on_token: Callable[[int], bool] | None = None
    grammar: TokenGrammar | None = None
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    finish: Finish | None = None
    error: Exception | None = None
    """What its own sampling, grammar or `on_token` raised, where `finish` is "failed"."""
    cached_tokens: int = 0
    """Tokens of the prompt that did not have to be read."""
    generator: torch.Generator | None = field(default=None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)
    """`[vocab]` bool, for a repetition penalty."""
    rng_state: Tensor | None = field(default=None, repr=False)
    """The generator's state before a draw whose token is not taken yet."""
    sequence: CachedSequence | None = field(default=None, repr=False)
    shared_end: int = field(default=0, repr=False)
    """Where reading stops once, because others begin alike."""

    @property
    def text(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.tokens

    def uncached(self) -> int:
        """Tokens of the text that the cache does not hold yet."""
        assert self.sequence is not None
        return len(self.prompt) + len(self.tokens) - self.sequence.length

    def append(self, token: int, log_probability: float) -> Finish | None:
        """Add a token; how the answer ends with it, or None where it goes on. Raises what `grammar` and `on_token` raise."""
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self.rng_state = None
        if self.seen is not None:
            self.seen[token] = True
        if self.grammar is not None and token not in self.stop_ids:
            self.grammar.advance(token)
        if token in self.stop_ids or (self.on_token is not None and self.on_token(token)):
            return "stop"
        return "length" if len(self.tokens) == self.sampling.max_new_tokens else None

    def undo(self) -> None:
        """Undo a draw whose token was not taken, so that the next draw is the same one."""
        del self.tokens[len(self.log_probabilities) :]
        if self.rng_state is not None and self.generator is not None:
            self.generator.set_state(self.rng_state)
        self.rng_state = None

    def raise_error(self) -> None:
        """Raise what the request failed with, if it did."""
        if self.error is not None:
            raise self.error


def new_request(
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    vocabulary: int,
    device: torch.device,
    stop_ids: Iterable[int] = (),
    on_token: Callable[[int], bool] | None = None,
    grammar: TokenGrammar | None = None,
) -> Request:
    """A request with a generator of its own. Raises `UserError` for an empty prompt or an id outside the vocabulary."""
    if not prompt:
        raise UserError("a prompt is empty", hint="every prompt needs at least one token (BOS)")
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        wrong = max(prompt) if max(prompt) >= vocabulary else min(prompt)
        raise UserError(
            f"a prompt holds id {wrong} and the model knows {vocabulary}",
            hint="encode it with the model's own tokenizer",
        )
    if sampling.stop or sampling.json_schema is not None:
        raise UserError(
            "stop strings and a JSON schema need a tokenizer, and a request holds token ids only",
            hint="use LocalEngine, or give `stop_ids`, `on_token` and `grammar`",
        )
    request = Request(list(prompt), sampling, frozenset(stop_ids), on_token, grammar)
    request.generator = torch.Generator(device).manual_seed(
        fresh_seed() if sampling.seed is None else sampling.seed
    )
    if sampling.repetition_penalty != 1.0:
        request.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        request.seen[torch.tensor(request.prompt, device=device)] = True
    return request


def sample_next(requests: Sequence[Request], logits: Tensor) -> list[tuple[int, float] | Exception]:
    """The next token of each request and its log-probability as the model gives it, from logits `[batch, vocab]`; for a request whose own
    grammar raises, or for which no token can be drawn, the exception.

    Requests with equal settings are drawn together; each has a generator of its own, so that its draw does not depend on the others. Until a
    token is taken, `Request.take_back` undoes its draw.
    """
    failed: dict[int, Exception] = {}
    allowed = _apply_grammars(requests, logits, failed)
    rules: dict[object, list[int]] = {}
    for row, request in enumerate(requests):
        if row not in failed:
            rules.setdefault(request.sampling.filters, []).append(row)
    tokens = [0] * len(requests)
    for rows in rules.values():
        part = allowed if len(rows) == len(requests) else allowed[rows]
        try:
            drawn = _sample_group([requests[row] for row in rows], part)
        except NoTokenError:
            # Whose it is shows when each is drawn for alone.
            for row in rows:
                try:
                    [tokens[row]] = _sample_group([requests[row]], allowed[row : row + 1])
                except NoTokenError as error:
                    failed[row] = error
        else:
            for row, token in zip(rows, drawn, strict=True):
                tokens[row] = token
    scores = log_probabilities(logits, torch.tensor(tokens, device=logits.device)).tolist()
    failed.update({row: NoTokenError() for row, score in enumerate(scores) if math.isnan(score)} | failed)
    return [failed.get(row, pair) for row, pair in enumerate(zip(tokens, scores, strict=True))]


def _apply_grammars(requests: Sequence[Request], logits: Tensor, failed: dict[int, Exception]) -> Tensor:
    """The logits with `-inf` where a grammar forbids a token; what a grammar raises goes into `failed`, by row."""
    if all(request.grammar is None for request in requests):
        return logits
    allowed = logits.clone()
    for row, request in enumerate(requests):
        if request.grammar is None:
            continue
        try:
            mask = request.grammar.mask().to(logits.device)
            # A model may have more rows than its tokenizer has ids.
            allowed[row, : mask.shape[0]].masked_fill_(~mask, -torch.inf)
            allowed[row, mask.shape[0] :] = -torch.inf
        except Exception as error:  # noqa: BLE001 - it is its own caller's
            failed[row] = error
    return allowed


def _sample_group(group: Sequence[Request], logits: Tensor) -> list[int]:
    """A token for each request of a group of equal settings. A draw that was made before and not taken is made again."""
    sampling = group[0].sampling
    if not sampling.greedy:
        for request in group:
            request.undo()
            assert request.generator is not None
            request.rng_state = request.generator.get_state()
    generators = [request.generator for request in group if request.generator is not None]
    seen = [request.seen for request in group if request.seen is not None]
    return choose(logits, sampling, generators, torch.stack(seen) if seen else None).tolist()
