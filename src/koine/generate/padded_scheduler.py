"""Continuous batching for models of `transformers`, over left-padded KV caches.

Same interface as `koine.generate.scheduler.Scheduler`. Each step prefills one chunk of the waiting prompts (part of
a long one, or several short ones together), then decodes one token for every running request. A prompt is
prefilled in a cache of its own, whose row then joins a running batch. Texts of very different lengths run in
batches of their own, so that at most half of a large batch is padding.

For classes whose batches give the logits of each text alone (`koine.generate.cache_support.probe_padding`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate.cache.cached_forward import CachedForward
from koine.generate.cache.prefix_cache import COMPARED_PROMPTS, MIN_TOKENS, common_length
from koine.generate.request import Finish, Request, TokenGrammar, new_request, sample_next
from koine.generate.sampling import Sampling
from koine.model.causal_lm import CausalLM

if TYPE_CHECKING:
    from koine.generate.cache.padded_cache import LayerShape, PaddedCache

SHORT = 512
"""Texts up to this length share a batch, whatever their padding: a forward pass of its own costs more."""


@dataclass(eq=False)
class Batch:
    """Requests that run together, in the order of the cache's rows."""

    requests: list[Request]
    cache: PaddedCache


@dataclass(frozen=True, eq=False)
class Prefix:
    """The KV cache of an earlier text, one row."""

    tokens: list[int]
    cache: PaddedCache


class PaddedScheduler:
    """Runs requests with one model of `transformers`.

    Attributes:
        waiting: requests without a KV cache, in order.
        prefilling: the request whose long prompt is not wholly in its KV cache, with this cache.
        batches: requests that get a token at every step.
    """

    def __init__(
        self,
        model: CausalLM,
        shapes: Sequence[LayerShape],
        *,
        max_batch: int = 32,
        max_bytes: int | None = None,
        prefill_chunk: int = 2048,
        prefixes: int = 8,
    ) -> None:
        """Create empty KV caches.

        Args:
            model: a causal LM that continues padded batches.
            shapes: of its layers, from `probe_padding`.
            max_batch: requests that run at once.
            max_bytes: bytes of all KV caches, cached prefixes included; None sets no limit.
            prefill_chunk: prompt tokens processed between two decode steps of the running requests.
            prefixes: earlier texts whose KV cache is kept for reuse.
        """
        from koine.generate.cache.padded_cache import PaddedCache

        for name, value in (("max_batch", max_batch), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise UserError(f"{name} is {value}", hint="it must be at least 1")
        self.model, self.max_batch, self.max_bytes = model, max_batch, max_bytes
        self.prefill_chunk, self.prefixes = prefill_chunk, prefixes
        self.waiting: deque[Request] = deque()
        self.prefilling: Batch | None = None
        self.batches: list[Batch] = []
        self.cached: list[Prefix] = []
        self._unfinished: list[Request] = []
        self._ungrouped = 0
        self._forward = CachedForward(model.inner)
        self.device, self.vocabulary = self._forward.device, model.vocab_size
        self._empty: Callable[[], PaddedCache] = lambda: PaddedCache(shapes)

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
        needed = self._empty().allocated_bytes(1, len(prompt) + sampling.max_new_tokens)
        if self.max_bytes is not None and needed > self.max_bytes:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with {sampling.max_new_tokens} new ones "
                f"needs {needed:,} bytes of KV cache and may have {self.max_bytes:,}",
                hint="give the cache more memory, or ask for fewer new tokens",
            )
        request = new_request(
            prompt,
            sampling,
            vocabulary=self.vocabulary,
            device=self.device,
            stop_ids=stop_ids,
            on_token=on_token,
            grammar=grammar,
        )
        self._unfinished = [*(one for one in self._unfinished if one.finish is None), request]
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop an unfinished request; its tokens so far remain."""
        if request.finish is not None:
            return
        try:
            with torch.inference_mode():
                self._end(request, "cancelled")
        except BaseException:
            self._requeue_all()
            raise

    @property
    def running(self) -> list[Request]:
        """Requests that get a token at every step."""
        return [request for batch in self.batches for request in batch.requests]

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.prefilling or self.batches)

    def run(self) -> None:
        """Step until every request is finished, then raise the error of the first that failed."""
        unfinished = [request for request in self._unfinished if request.finish is None]
        while self.busy:
            self.step()
        for request in unfinished:
            request.raise_error()

    def bytes(self) -> int:
        """Return the bytes of all KV caches, cached prefixes included."""
        return sum(cache.bytes() for cache in self._caches())

    # -- one step ---

    def step(self) -> list[tuple[Request, int]]:
        """Prefill one chunk of prompts, decode one token for each running request, and return the new tokens.

        On an interrupt or out of memory, every request returns to the queue unchanged. Where the grammar, the
        sampling or the `on_token` of one request raises, or the forward pass of a prompt that is prefilled
        alone, only this request ends: its `finish` is "failed" and `error` the exception.
        """
        try:
            with torch.inference_mode():
                return self._prefill() + self._decode()
        except BaseException:
            self._requeue_all()
            raise

    def _prefill(self) -> list[tuple[Request, int]]:
        """Prefill one chunk. Requests whose prompt is complete get their first token and join a batch."""
        if self.prefilling is None and not self._admit():
            return []
        batch = self.prefilling
        assert batch is not None
        texts = [request.all_tokens for request in batch.requests]
        done = batch.cache.lengths or [0] * len(texts)
        rows = [text[start : start + self.prefill_chunk] for text, start in zip(texts, done, strict=True)]
        try:
            logits_rv = self._forward.batch(batch.cache, rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again for the request's caller
            self.prefilling = None
            if len(rows) == 1:
                self._fail(batch.requests[0], error)
            else:
                # One of the prompts is at fault: each is prefilled alone, and only that one fails.
                self._ungrouped = len(rows)
                self.waiting.extendleft(reversed(batch.requests))
            return []
        if batch.cache.lengths[0] < len(texts[0]):
            return []
        self.prefilling = None
        self._join(batch)
        return self._sample(batch.requests, logits_rv)

    def _admit(self) -> bool:
        """Begin to prefill the oldest waiting requests; return False where none can begin."""
        room = self.max_batch - len(self.running)
        if not self.waiting or room < 1:
            return False
        first = self.waiting[0]
        prefix, shared = self._longest_prefix(first)
        alone = prefix is not None or self._ungrouped > 0
        self._ungrouped = max(0, self._ungrouped - 1)
        group = [first] if alone else self._group(first, room)
        longest = max(len(request.all_tokens) for request in group)
        while not self._has_room(len(group), longest):
            if len(group) > 1:
                group = group[:1]
                longest = len(first.all_tokens)
            elif self.cached:
                self.cached.pop(0)
            elif self.batches:
                return False
            else:
                # Nothing else holds memory, and `submit` made sure that the request fits alone.
                break
        cache = self._empty()
        if prefix is not None:
            batch, row = prefix
            cache = batch.row_copy(row, shared)
        for request in group:
            self.waiting.remove(request)
            if not request.tokens:
                request.cached_tokens = shared
        self.prefilling = Batch(group, cache)
        return True

    def _group(self, first: Request, room: int) -> list[Request]:
        """Return the requests to prefill together with the first: at most half of the batch is padding.

        A prompt that shares much of the first one waits until it can copy that part of the cache.
        """
        group = [first]
        longest = total = len(first.all_tokens)
        if longest > self.prefill_chunk:
            return group
        for other in islice(self.waiting, 1, 1 + COMPARED_PROMPTS):
            if len(group) == room:
                break
            size = len(other.all_tokens)
            rows, longer = len(group) + 1, max(longest, size)
            shared = common_length(first.all_tokens, other.all_tokens)
            if shared >= 2 * MIN_TOKENS and 2 * shared >= size and self.prefixes:
                continue
            if rows * longer <= self.prefill_chunk and 2 * (total + size) >= rows * longer:
                group.append(other)
                longest, total = longer, total + size
        return group

    def _longest_prefix(self, request: Request) -> tuple[tuple[PaddedCache, int] | None, int]:
        """Return the cache and row that begin with most of the request's text, and how many tokens."""
        if not self.prefixes:
            return None, 0
        text = request.all_tokens
        found, longest = None, 0
        candidates = [(prefix.cache, 0, prefix.tokens) for prefix in self.cached]
        for batch in self.batches:
            tokens = (other.all_tokens for other in batch.requests)
            candidates += [(batch.cache, row, other) for row, other in enumerate(tokens)]
        for cache, row, other in candidates:
            length = cache.lengths[row]
            shared = min(common_length(text, other[:length]), len(text) - 1)
            if shared < length and not cache.can_cut(row):
                continue
            # A short beginning is computed again: prompts without a prefix are prefilled together.
            if shared > longest and (
                shared >= 2 * MIN_TOKENS or (2 * shared >= len(text) and shared == length)
            ):
                found, longest = (cache, row), shared
        for prefix in self.cached:
            if found is not None and prefix.cache is found[0]:
                self.cached = [*(one for one in self.cached if one is not prefix), prefix]
        return found, longest

    def _has_room(self, rows: int, columns: int) -> bool:
        """Return whether so many more rows may be prefilled and join a batch."""
        if self.max_bytes is None:
            return True
        empty = self._empty()
        # While rows join, their own cache and the old and the new batch are there, one layer at a time.
        own = empty.allocated_bytes(rows, columns + 1)
        largest = 0
        target = self._target([columns] * rows)
        if target is not None:
            joined = len(target.requests) + rows
            after = empty.allocated_bytes(joined, max(columns, target.cache.columns) + 1)
            largest = max(0, after - own - target.cache.bytes())
        return self.bytes() + own + largest <= self.max_bytes

    def _target(self, lengths: Sequence[int]) -> Batch | None:
        """Return the batch that rows of these lengths join; None for a batch of their own."""
        for batch in self.batches:
            after = [*batch.cache.lengths, *lengths]
            if max(after) <= SHORT or max(after) * len(after) <= 2 * sum(after):
                return batch
        return None

    def _join(self, batch: Batch) -> None:
        """Add prefilled requests to a running batch."""
        target = self._target(batch.cache.lengths)
        if target is None:
            self.batches.append(Batch(list(batch.requests), batch.cache))
        else:
            target.cache.join(batch.cache)
            target.requests += batch.requests

    def _decode(self) -> list[tuple[Request, int]]:
        """Generate one token for each running request."""
        self._make_room()
        new = []
        for batch in list(self.batches):
            logits_rv = self._forward.batch(batch.cache, [request.tokens[-1:] for request in batch.requests])
            new += self._sample(list(batch.requests), logits_rv)
        return new

    def _make_room(self) -> None:
        """Free memory for one more token of each running request: cached prefixes first, then the youngest."""
        while self.max_bytes is not None and self.batches:
            grown = sum(batch.cache.grown_bytes() for batch in self.batches)
            others = [prefix.cache for prefix in self.cached]
            if self.prefilling is not None:
                others.append(self.prefilling.cache)
            if grown + sum(cache.bytes() for cache in others) <= self.max_bytes:
                return
            if self.cached:
                self.cached.pop(0)
            elif self.prefilling is not None:
                self._requeue(self.prefilling.requests[-1])
            elif len(self.running) > 1:
                self._requeue(self.batches[-1].requests[-1])
            else:
                return

    def _sample(self, requests: list[Request], logits_rv: Tensor) -> list[tuple[Request, int]]:
        """Sample the next token of each request. Finished and failed requests leave their batch."""
        new = []
        for request, sample in zip(requests, sample_next(requests, logits_rv), strict=True):
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
        """Finish a request. Its KV cache is kept for texts that continue it."""
        request.finish = finish
        for batch in self.batches:
            if request in batch.requests and self.prefixes:
                self._keep(request, batch)
        self._leave(request)

    def _keep(self, request: Request, batch: Batch) -> None:
        """Cache the text of a running request as a prefix, where there is memory for it."""
        row = batch.requests.index(request)
        length = batch.cache.lengths[row]
        tokens = request.all_tokens[:length]
        # A text that it continues is not needed any more.
        self.cached = [one for one in self.cached if one.tokens != tokens[: len(one.tokens)]]
        self.cached = self.cached[max(0, len(self.cached) + 1 - self.prefixes) :]
        if self.max_bytes is not None:
            needed = self._empty().allocated_bytes(1, length)
            while self.cached and self.bytes() + needed > self.max_bytes:
                self.cached.pop(0)
            if self.bytes() + needed > self.max_bytes:
                return
        self.cached.append(Prefix(tokens, batch.cache.row_copy(row, length)))

    def _leave(self, request: Request) -> None:
        """Take a request out of the queue or its batch."""
        if request in self.waiting:
            self.waiting.remove(request)
        if self.prefilling is not None and request in self.prefilling.requests:
            # The cache is lost; other requests of the group begin again.
            others = [other for other in self.prefilling.requests if other is not request]
            self.waiting.extendleft(reversed(others))
            self.prefilling = None
        for batch in self.batches:
            if request in batch.requests:
                row, last = batch.requests.index(request), batch.requests.pop()
                if last is not request:
                    batch.requests[row] = last
                batch.cache.remove(row)
        self.batches = [batch for batch in self.batches if batch.requests]

    def _fail(self, request: Request, error: Exception) -> None:
        request.error, request.finish = error, "failed"
        self._leave(request)

    def _requeue(self, request: Request) -> None:
        """Return a request to the front of the queue, without its KV cache."""
        request.undo()
        self._leave(request)
        self.waiting.appendleft(request)

    def _requeue_all(self) -> None:
        """Return every request to the queue. No cache survives: a forward pass may have written half of it."""
        self.batches, self.prefilling, self.cached = [], None, []
        self.waiting = deque(request for request in self._unfinished if request.finish is None)
        for request in self.waiting:
            request.undo()

    def _caches(self) -> list[PaddedCache]:
        caches = [batch.cache for batch in (*self.batches, *([self.prefilling] if self.prefilling else ()))]
        return caches + [prefix.cache for prefix in self.cached]
