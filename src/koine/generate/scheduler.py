"""Continuous batching: requests of any length join and leave the running batch at every step.

Each step reads one stretch of prompts (a long one in chunks, several short ones packed), then gives every running request its next
token. What a request gets does not depend on its neighbours, and no request is lost: where the cache is full, kept beginnings go first,
then the youngest request goes back to the queue and is read again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from koine.errors import UserError
from koine.generate.cache.contexts import DecodeContext, PrefillContext
from koine.generate.cache.paged_cache import PAGE, OutOfPages, PagedCache
from koine.generate.cache.prefix_cache import PrefixCache, common_length
from koine.generate.cpu.prepacked_decoder import build_prepacked_decoder
from koine.generate.request import Finish, Request, TokenGrammar, new_request, sample_next
from koine.generate.sampling import Sampling
from koine.model.attention.context import AttentionContext
from koine.model.decoder import Decoder


class Scheduler:
    """Answers requests with one model.

    max_batch: requests that run at once. max_pages: pages that the cache may use (default: as many as needed).
    prefill_chunk: tokens of prompts read between two steps of the running requests. prefixes: beginnings kept for reuse.
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

    # -- requests ------------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int], bool] | None = None,
        grammar: TokenGrammar | None = None,
    ) -> Request:
        """Queue a prompt. Raises `UserError` where it is empty, holds an id that the model lacks, or can never fit the cache."""
        most = self.cache.max_pages
        needed = self.cache.pages_for(len(prompt) + sampling.max_new_tokens)
        if most is not None and needed > most:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with an answer of {sampling.max_new_tokens} needs {needed} pages and the cache has {most}",
                hint="give the cache more memory, or ask for a shorter answer",
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
        """Stop a request wherever it is; what it has stays in it."""
        if request.finish is None:
            self._end(request, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting or self.prefilling or self.running)

    def run(self) -> None:
        """Step until every request is finished; then raise what the first of those that failed, if any, failed with."""
        unfinished = [*self.running, *self.prefilling, *self.waiting]
        while self.busy:
            self.step()
        for request in unfinished:
            request.raise_error()

    # -- one step ------------------------------------------------------------------------------------------------------

    def step(self) -> list[tuple[Request, int]]:
        """Read a stretch of prompts and give each running request a token; the new tokens, request by request.

        Where it is interrupted (Ctrl-C, out of memory), every request goes back to the queue as it was: nothing half-read or half-drawn
        stays. Where the grammar, the draw or the `on_token` of one request raises, it alone ends: `finish` is "failed", `error` what it raised.
        """
        try:
            with torch.inference_mode():
                new = list(self._prefill())
                new += self._decode()
        except BaseException:
            self._requeue_all()
            raise
        return new

    def _prefill(self) -> Iterator[tuple[Request, int]]:
        self._admit()
        if not self.prefilling:
            return
        first = self.prefilling[0]
        group, counts = [first], [min(self._chunk_size(first), self.prefill_chunk)]
        # Short stretches share a forward pass, wherever in their prompts they begin.
        room = self.prefill_chunk - counts[0]
        for other in self.prefilling[1:]:
            size = self._chunk_size(other)
            if size <= room:
                group.append(other)
                counts.append(size)
                room -= size
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
            return
        hidden = self._forward(ids, context)
        ends = torch.tensor(counts, device=self.device).cumsum(0) - 1
        done = [index for index, request in enumerate(group) if not request.uncached()]
        for request in group:
            if request.shared_end and request.sequence and request.sequence.length == request.shared_end:
                self.prefixes.keep(request.sequence, request.text[: request.shared_end])
                request.shared_end = 0
        if done:
            finished = [group[index] for index in done]
            self.prefilling = [request for request in self.prefilling if request not in finished]
            self.running += finished
            yield from self._sample(finished, self.model.logits(hidden[ends[done]]))

    def _chunk_size(self, request: Request) -> int:
        """Tokens that can be read at once: up to the end of the prompt, or to where reading pauses."""
        assert request.sequence is not None
        stop = request.shared_end - request.sequence.length
        return min(request.uncached(), stop) if stop > 0 else request.uncached()

    def _admit(self) -> None:
        while self.waiting and len(self.running) + len(self.prefilling) < self.max_batch:
            request = self.waiting[0]
            text = request.text
            if any(0 < other.shared_end <= common_length(text, other.prompt) for other in self.prefilling):
                # What this one has in common with a prompt that is being read will be there in a moment.
                return
            prefix = self.prefixes.longest_match(text)
            held = 0 if prefix is None else prefix.length // self.cache.page
            promised = sum(
                self.cache.pages_for(len(other.text) + 1) - len(other.sequence.pages)
                for other in self.prefilling
                if other.sequence is not None
            )
            if self.cache.pages_for(len(text) + 1) - held + promised > self.cache.pages_left():
                if self.prefixes.evict_oldest():
                    continue
                return
            self.waiting.popleft()
            request.sequence = self.cache.add(prefix)
            if not request.tokens:
                request.cached_tokens = request.sequence.length
                others = (other.prompt for other in self.waiting)
                request.shared_end = self.prefixes.shared_length(
                    request.prompt, others, known=request.cached_tokens
                )
            self.prefilling.append(request)

    def _decode(self) -> list[tuple[Request, int]]:
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
            hidden = self._forward([request.tokens[-1] for request in batch], context)
            return self._sample(batch, self.model.logits(hidden))
        return []

    def _forward(self, ids: Sequence[int], context: AttentionContext) -> Tensor:
        """Hidden states `[tokens, hidden]` of the tokens of a reading."""
        tokens = torch.tensor(ids, device=self.device)
        if self._prepacked is not None:
            return self._prepacked(tokens, context)
        hidden: Tensor = self.model(tokens.view(context.positions.shape), context=context)
        return hidden.flatten(0, 1)

    def _sample(self, requests: Sequence[Request], logits: Tensor) -> list[tuple[Request, int]]:
        """The next token of each request from its logits `[batch, vocab]`; finished and failed requests leave."""
        new = []
        for request, choice in zip(requests, sample_next(requests, logits), strict=True):
            if isinstance(choice, Exception):
                self._fail(request, choice)
                continue
            try:
                finish = request.append(*choice)
            except Exception as error:  # noqa: BLE001 - its own grammar or watch raised it; the others go on
                self._fail(request, error)
                continue
            new.append((request, choice[0]))
            if finish is not None:
                self._end(request, finish)
        return new

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _end(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request.sequence is not None:
            self.prefixes.keep(request.sequence, request.text[: request.sequence.length])
            self.cache.remove(request.sequence)
            request.sequence = None
        for queue in (self.waiting, self.prefilling, self.running):
            if request in queue:
                queue.remove(request)

    def _fail(self, request: Request, error: Exception) -> None:
        request.error = error
        self._end(request, "failed")

    def _free_pages(self) -> None:
        """Give pages back: a kept beginning, or else the youngest request's."""
        if self.prefixes.evict_oldest():
            return
        youngest = (self.running + self.prefilling)[-1]
        self._requeue(youngest)

    def _requeue(self, request: Request) -> None:
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


def _slot(request: Request) -> int:
    """Where the cache has a request: in this order a batch lies as it is, and nothing moves where somebody leaves."""
    assert request.sequence is not None
    return request.sequence.slot


def _next_tokens(request: Request, count: int) -> list[int]:
    assert request.sequence is not None
    start = request.sequence.length
    return request.text[start : start + count]
