"""Requests, and sampling the next token of several of them.

Shapes: b requests, v vocabulary (`logits_bv`).
"""

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
from koine.generate.token_sampling import EXTREME, NoTokenError, choose, log_probabilities

Finish = Literal["stop", "length", "cancelled", "failed"]


class TokenGrammar(Protocol):
    """Restricts the next token of one request."""

    def mask(self) -> Tensor:
        """Return `[vocab]` bool, True where a token is allowed; at least one is."""
        ...

    def advance(self, token: int) -> None:
        """Take the sampled token."""
        ...


@dataclass(eq=False)
class Request:
    """A prompt and its generated tokens.

    `tokens` and `log_probabilities` grow as they are generated; `finish` is set at the end.

    stop_ids: tokens that end generation; the one found is the last of `tokens`.
    on_token: called with each token that is no stop id; returning True ends generation after it.
    grammar: restricts each token.
    error: what the request's own sampling, grammar or `on_token` raised, where `finish` is "failed".
    cached_tokens: tokens of the prompt that were in the KV cache already.
    generator: random state of this request.
    tempered: record log-probabilities of the distribution at the sampling's temperature, not of the model's own.
    seen: `[vocab]` bool, tokens so far; kept for a repetition penalty only.
    rng_state: state of `generator` before a sample that is not appended yet.
    sequence: the request's place in the KV cache, while it has one.
    shared_end: prefill pauses once after this many tokens, which other prompts share; 0 for no pause.
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
    cached_tokens: int = 0
    tempered: bool = False
    generator: torch.Generator | None = field(default=None, repr=False)
    seen: Tensor | None = field(default=None, repr=False)
    rng_state: Tensor | None = field(default=None, repr=False)
    sequence: CachedSequence | None = field(default=None, repr=False)
    shared_end: int = field(default=0, repr=False)

    @property
    def all_tokens(self) -> list[int]:
        """Prompt and generated tokens so far."""
        return self.prompt + self.tokens

    def uncached(self) -> int:
        """Return the number of tokens that are not in the KV cache yet."""
        assert self.sequence is not None
        return len(self.prompt) + len(self.tokens) - self.sequence.length

    def append(self, token: int, log_probability: float) -> Finish | None:
        """Append a sampled token; return why generation ends with it, or None.

        Raises what `grammar` and `on_token` raise.
        """
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
        """Undo a sample that was not appended, so that the next sample is the same."""
        del self.tokens[len(self.log_probabilities) :]
        if self.rng_state is not None and self.generator is not None:
            self.generator.set_state(self.rng_state)
        self.rng_state = None

    def raise_error(self) -> None:
        """Raise the error of a failed request."""
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
    """Return a request with its own random generator.

    Raises `UserError` for an empty prompt, an id outside the vocabulary, and settings that need a tokenizer.
    """
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
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    request.generator = torch.Generator(device).manual_seed(seed)
    if sampling.repetition_penalty != 1.0:
        request.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        request.seen[torch.tensor(request.prompt, device=device)] = True
    return request


def sample_next(requests: Sequence[Request], logits_bv: Tensor) -> list[tuple[int, float] | Exception]:
    """Sample the next token of each request.

    Requests with equal settings are sampled together. Each has its own generator, so that its sample does not
    depend on the others. Until a token is appended, `Request.undo` undoes its sample.

    Returns:
        For each request the token and its log-probability under the model's own logits (`Request.tempered`:
        divided by the temperature), or the exception that its grammar raised, or `NoTokenError` where no token
        can be sampled.
    """
    failed: dict[int, Exception] = {}
    allowed_bv = _apply_grammars(requests, logits_bv, failed)
    groups: dict[object, list[int]] = {}
    for row, request in enumerate(requests):
        if row not in failed:
            groups.setdefault(request.sampling.filters, []).append(row)
    tokens = [0] * len(requests)
    for rows in groups.values():
        group_bv = allowed_bv if len(rows) == len(requests) else allowed_bv[rows]
        try:
            sampled = _sample_group([requests[row] for row in rows], group_bv)
        except NoTokenError:
            # Sample each row alone to find the one that failed.
            for row in rows:
                try:
                    [tokens[row]] = _sample_group([requests[row]], allowed_bv[row : row + 1])
                except NoTokenError as error:
                    failed[row] = error
        else:
            for row, token in zip(rows, sampled, strict=True):
                tokens[row] = token
    tokens_b = torch.tensor(tokens, device=logits_bv.device)
    if any(request.tempered for request in requests):
        scores = _tempered_log_probabilities(requests, logits_bv, tokens_b).tolist()
    else:
        scores = log_probabilities(logits_bv, tokens_b).tolist()
    failed.update({row: NoTokenError() for row, score in enumerate(scores) if math.isnan(score)} | failed)
    return [failed.get(row, pair) for row, pair in enumerate(zip(tokens, scores, strict=True))]


def _tempered_log_probabilities(requests: Sequence[Request], logits_bv: Tensor, tokens_b: Tensor) -> Tensor:
    """Return each token's log-probability, at the temperature of its request if that asks for it, `[b]`."""
    factors = [one.sampling.temperature if one.tempered else 1.0 for one in requests]
    logits_bv = logits_bv.float() / torch.tensor(factors, device=logits_bv.device).clamp(max=EXTREME)[:, None]
    # As training computes it. `log_softmax` adds up large vocabularies with an error of 1e-5 of the sum on CPU,
    # always to the same side.
    return logits_bv.gather(1, tokens_b[:, None])[:, 0] - logits_bv.logsumexp(dim=-1)


def _apply_grammars(requests: Sequence[Request], logits_bv: Tensor, failed: dict[int, Exception]) -> Tensor:
    """Return the logits with `-inf` on tokens that a grammar forbids.

    A grammar's exception goes into `failed`, by row.
    """
    if all(request.grammar is None for request in requests):
        return logits_bv
    allowed_bv = logits_bv.clone()
    for row, request in enumerate(requests):
        if request.grammar is None:
            continue
        try:
            mask_v = request.grammar.mask().to(logits_bv.device)
            # A model may have more rows than its tokenizer has ids.
            allowed_bv[row, : mask_v.shape[0]].masked_fill_(~mask_v, -torch.inf)
            allowed_bv[row, mask_v.shape[0] :] = -torch.inf
        except Exception as error:  # noqa: BLE001 - raised again for the request's own caller
            failed[row] = error
    return allowed_bv


def _sample_group(group: Sequence[Request], logits_bv: Tensor) -> list[int]:
    """Sample a token for each request of equal settings. A sample that was not appended is repeated."""
    sampling = group[0].sampling
    if not sampling.greedy:
        for request in group:
            request.undo()
            assert request.generator is not None
            request.rng_state = request.generator.get_state()
    generators = [request.generator for request in group if request.generator is not None]
    seen = [request.seen for request in group if request.seen is not None]
    return choose(logits_bv, sampling, generators, torch.stack(seen) if seen else None).tolist()
