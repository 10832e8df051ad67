"""Continuous batching: requests of any length join and leave the running batch at every step.

Each step prefills one chunk of the waiting prompts (part of a long one, or several short ones packed), then
decodes one token for every running request. A request's tokens do not depend on its neighbours. No request is
lost: where the KV cache is full, cached prefixes are evicted first, then the youngest request returns to the
queue and is prefilled again later.

Shapes: b requests, n tokens of one forward pass, h hidden size, v vocabulary (`hidden_nh`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import PAGE, OutOfPages, PagedCache
from koine.generate.cache.prefix_cache import PrefixCache, common_length
from koine.generate.cpu.prepacked_decoder import build_prepacked_decoder
from koine.generate.request import Finish, Request, TokenGrammar, new_request, sample_next
from koine.generate.sampling import Sampling
from koine.model.attention.context import PackedAttentionContext
from koine.model.attention.rope_frequencies import rope_of
from koine.model.config import ModelConfig
from koine.model.decoder import Decoder


class Scheduler:
    """Runs requests with one model.

    Attributes:
        waiting: requests without a place in the KV cache, in order.
        prefilling: requests whose prompt is not wholly in the KV cache.
        running: requests that get a token at every step.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_batch: int = 32,
        max_pages: int | None = None,
        prefill_chunk: int = 2048,
        prefixes: int = 16,
        page: int = PAGE,
    ) -> None:
        """Create an empty KV cache for the model.

        Args:
            model: the decoder.
            max_batch: requests that run at once.
            max_pages: pages that the KV cache may use; None sets no limit.
            prefill_chunk: prompt tokens processed between two decode steps of the running requests.
            prefixes: prefixes kept in the KV cache for reuse.
            page: positions of a page.
        """
        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk), ("page", page)):
            if value < 1:
                raise UserError(f"{name} is {value}", hint="it must be at least 1")
        self.model = model
        self.device = model.embedding.weight.device
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.cache: PagedCache = PagedCache.of_model(model, page=page, max_pages=max_pages)
        self.prefixes = PrefixCache(self.cache, entries=prefixes)
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.running: list[Request] = []
        self._last: DecodeContext | None = None
        self._prepacked = build_prepacked_decoder(model)
        self._unscaled = _unscaled_length(model.config)

    # -- requests ---

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int], bool] | None = None,
        grammar: TokenGrammar | None = None,
    ) -> Request:
        """Queue a prompt.

        Raises `UserError` where it is empty, holds an unknown id, or can never fit into the KV cache.
        """
        most = self.cache.max_pages
        needed = self.cache.pages_for(len(prompt) + sampling.max_new_tokens)
        if most is not None and needed > most:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with {sampling.max_new_tokens} new ones "
                f"needs {needed} pages and the cache has {most}",
                hint="give the cache more memory, or ask for fewer new tokens",
            )
        request = new_request(
            prompt,
            sampling,
            vocabulary=self.model.config.vocab_size,
            device=self.device,
            stop_ids=stop_ids,
            on_token=on_token,
            grammar=grammar,
        )
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop an unfinished request; its tokens so far remain."""
        if request.finish is None:
            self._end(request, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.prefilling or self.running)

    def run(self) -> None:
        """Step until every request is finished, then raise the error of the first that failed."""
        unfinished = [*self.running, *self.prefilling, *self.waiting]
        while self.busy:
            self.step()
        for request in unfinished:
            request.raise_error()

    # -- one step ---

    def step(self) -> list[tuple[Request, int]]:
        """Prefill one chunk of prompts, decode one token for each running request, and return the new tokens.

        On an interrupt or out of memory, every request returns to the queue unchanged: no half-written cache,
        no sample without its token. Where the grammar, the sampling or the `on_token` of one request raises,
        only this request ends: its `finish` is "failed" and `error` the exception.
        """
        try:
            with torch.inference_mode():
                new = self._prefill()
                new += self._decode()
        except BaseException:
            self._requeue_all()
            raise
        return new

    def _prefill(self) -> list[tuple[Request, int]]:
        """Prefill one chunk. Requests whose prompt is complete get their first token."""
        self._admit()
        if not self.prefilling:
            return []
        group, counts = self._next_chunk()
        ids = [
            token
            for request, count in zip(group, counts, strict=True)
            for token in _next_tokens(request, count)
        ]
        sequences = [request.sequence for request in group if request.sequence is not None]
        try:
            context = PrefillContext(self.cache, sequences, counts)
        except OutOfPages:
            self._free_pages()
            return []
        hidden_nh = self._forward(ids, context)
        last_n = torch.tensor(counts, device=self.device).cumsum(0) - 1
        for request in group:
            if request.shared_end and request.sequence and request.sequence.length == request.shared_end:
                self.prefixes.add(request.sequence, request.all_tokens[: request.shared_end])
                request.shared_end = 0
        done = [index for index, request in enumerate(group) if not request.uncached()]
        if not done:
            return []
        finished = [group[index] for index in done]
        self.prefilling = [request for request in self.prefilling if request not in finished]
        self.running += finished
        return self._sample(finished, self.model.logits(hidden_nh[last_n[done]]))

    def _next_chunk(self) -> tuple[list[Request], list[int]]:
        """Return the requests of the next chunk, and how many tokens of each it holds.

        The oldest request comes first. Others share its forward pass where the rest of their prompt fits.
        """
        first = self.prefilling[0]
        if self._beyond_unscaled(first):
            return [first], [self._dynamic_length(first)]
        group, counts = [first], [min(self._prefill_length(first), self.prefill_chunk)]
        room = self.prefill_chunk - counts[0]
        for other in self.prefilling[1:]:
            size = self._prefill_length(other)
            if size <= room and not self._beyond_unscaled(other):
                group.append(other)
                counts.append(size)
                room -= size
        return group, counts

    def _prefill_length(self, request: Request) -> int:
        """Return the tokens up to the end of the prompt, or to the end of its shared prefix."""
        assert request.sequence is not None
        shared = request.shared_end - request.sequence.length
        return min(request.uncached(), shared) if shared > 0 else request.uncached()

    def _beyond_unscaled(self, request: Request) -> bool:
        """Return whether RoPE's frequencies depend on the length of the request's text."""
        return len(request.prompt) + len(request.tokens) > self._unscaled

    def _dynamic_length(self, request: Request) -> int:
        """Return the tokens of the next chunk where RoPE's frequencies depend on the length of the text.

        The prompt is one chunk, as in `transformers`: a shorter one would rotate its keys by other angles.
        The generated tokens of a preempted request follow one by one, as they did before.
        """
        assert request.sequence is not None
        length, first = request.sequence.length, max(len(request.prompt), self._unscaled)
        return min(request.uncached(), int(first) - length) if length < first else 1

    def _admit(self) -> None:
        """Move requests from `waiting` to `prefilling` while there are slots and pages for them."""
        while self.waiting and len(self.running) + len(self.prefilling) < self.max_batch:
            request = self.waiting[0]
            text = request.all_tokens
            scaled = self._beyond_unscaled(request)
            if not scaled and any(
                0 < other.shared_end <= common_length(text, other.prompt) for other in self.prefilling
            ):
                # The prefix that it shares with a prompt in `prefilling` will be in the cache in a moment.
                return
            prefix = None if scaled else self.prefixes.longest_match(text)
            cached_pages = 0 if prefix is None else prefix.length // self.cache.page
            reserved = sum(
                self.cache.pages_for(len(other.all_tokens) + 1) - len(other.sequence.pages)
                for other in self.prefilling
                if other.sequence is not None
            )
            if self.cache.pages_for(len(text) + 1) - cached_pages + reserved > self.cache.pages_left():
                if self.prefixes.evict_oldest():
                    continue
                return
            self.waiting.popleft()
            request.sequence = self.cache.add(prefix)
            if not request.tokens and not scaled:
                request.cached_tokens = request.sequence.length
                others = (other.prompt for other in self.waiting)
                request.shared_end = self.prefixes.shared_length(
                    request.prompt, others, cached=request.cached_tokens
                )
            self.prefilling.append(request)

    def _decode(self) -> list[tuple[Request, int]]:
        """Generate one token for each running request."""
        while self.running:
            batch = sorted(self.running, key=_slot)
            sequences = [request.sequence for request in batch if request.sequence is not None]
            self.cache.arrange(sequences)
            try:
                context = DecodeContext(self.cache, sequences, self._last)
            except OutOfPages:
                self._free_pages()
                continue
            self._last = context
            hidden_bh = self._forward([request.tokens[-1] for request in batch], context)
            return self._sample(batch, self.model.logits(hidden_bh))
        return []

    def _forward(self, ids: Sequence[int], context: PackedAttentionContext) -> Tensor:
        """Return the hidden states `[n, h]` of the tokens of a prefill or decode step."""
        tokens_n = torch.tensor(ids, device=self.device)
        if self._prepacked is not None:
            return self._prepacked(tokens_n, context)
        hidden: Tensor = self.model(tokens_n.view(context.positions.shape), context=context)
        return hidden.flatten(0, 1)

    def _sample(self, requests: Sequence[Request], logits_bv: Tensor) -> list[tuple[Request, int]]:
        """Sample the next token of each request. Finished and failed requests leave the batch."""
        new = []
        for request, sample in zip(requests, sample_next(requests, logits_bv), strict=True):
            if isinstance(sample, Exception):
                self._fail(request, sample)
                continue
            try:
                finish = request.append(*sample)
            except Exception as error:  # noqa: BLE001 - raised by its own grammar or `on_token`; others go on
                self._fail(request, error)
                continue
            new.append((request, sample[0]))
            if finish is not None:
                self._end(request, finish)
        return new

    # -- leaving ---

    def _end(self, request: Request, finish: Finish) -> None:
        """Finish a request: its KV cache becomes a prefix, its slot is free."""
        request.finish = finish
        if request.sequence is not None:
            if request.sequence.length <= self._unscaled:
                self.prefixes.add(request.sequence, request.all_tokens[: request.sequence.length])
            self.cache.remove(request.sequence)
            request.sequence = None
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._end(request, "failed")

    def _free_pages(self) -> None:
        """Free pages: evict the oldest cached prefix, or else preempt the youngest request."""
        if self.prefixes.evict_oldest():
            return
        youngest = (self.running + self.prefilling)[-1]
        self._requeue(youngest)

    def _requeue(self, request: Request) -> None:
        """Return a request to the front of the queue, without its KV cache."""
        request.undo()
        if request.sequence is not None and request.sequence in self.cache.sequences:
            self.cache.remove(request.sequence)
        request.sequence = None
        self.prefilling = [other for other in self.prefilling if other is not request]
        self.running = [other for other in self.running if other is not request]
        self.waiting.appendleft(request)

    def _requeue_all(self) -> None:
        for request in reversed([*self.running, *self.prefilling]):
            self._requeue(request)


def _unscaled_length(config: ModelConfig) -> float:
    """Return the length of a text up to which the keys of its tokens do not depend on the length."""
    ropes = [rope_of(config, spec) for spec in config.layers if spec.rope]
    dynamic = any(rope.scaling is not None and rope.scaling.kind == "dynamic" for rope in ropes)
    return config.max_position_embeddings if dynamic else math.inf


def _slot(request: Request) -> int:
    """Return the request's slot.

    In this order the batch needs no copies in the cache, also after one left.
    """
    assert request.sequence is not None
    return request.sequence.slot


def _next_tokens(request: Request, count: int) -> list[int]:
    """Return the next `count` tokens that are not in the KV cache."""
    assert request.sequence is not None
    start = request.sequence.length
    return request.all_tokens[start : start + count]
