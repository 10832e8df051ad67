"""Generate one request at a time with any causal LM of transformers and its own KV cache.

For classes that cannot continue texts of different lengths in one batch (`koine.generate.padded_scheduler`). Same
interface as `koine.generate.scheduler.Scheduler`, so that an engine need not know which it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from koine.generate.cache.cached_forward import CachedForward
from koine.generate.cache_support import probe_cache_support
from koine.generate.request import Finish, Request, TokenGrammar, new_request, sample_next
from koine.generate.sampling import Sampling
from koine.model.causal_lm import CausalLM


class SequentialGenerator:
    """Runs requests in the order of their submission.

    A prompt that continues the previous text reuses its KV cache, where the model's cache allows that
    (`koine.generate.cache_support`).
    """

    def __init__(self, model: CausalLM, *, prefill_chunk: int = 2048) -> None:
        self.model, self.prefill_chunk = model, prefill_chunk
        self.device, self.vocabulary = next(model.parameters()).device, model.vocab_size
        self.waiting: deque[Request] = deque()
        self._cached: list[int] = []
        self._past: Any = None
        self._forward = CachedForward(model.inner)
        with torch.inference_mode():
            self._cache_support = probe_cache_support(model.inner)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int], bool] | None = None,
        grammar: TokenGrammar | None = None,
    ) -> Request:
        """Queue a prompt. Raises `UserError` where it is empty or holds an unknown id."""
        request = new_request(
            prompt,
            sampling,
            vocabulary=self.vocabulary,
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
            request.finish = "cancelled"
            self.waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting)

    def run(self) -> None:
        """Step until every request is finished, then raise the error of the first that failed."""
        unfinished = list(self.waiting)
        while self.busy:
            self.step()
        for request in unfinished:
            request.raise_error()

    def step(self) -> list[tuple[Request, int]]:
        """Generate the next token of the oldest request.

        Where the forward pass, the sampling, the grammar or `on_token` raises, the request fails: its
        `finish` is "failed" and `error` the exception. An interrupt undoes a sample that was not appended.
        """
        if not self.waiting:
            return []
        request = self.waiting[0]
        finish: Finish | None
        try:
            with torch.inference_mode():
                logits_v = self._next_logits(request)
                [sample] = sample_next([request], logits_v[None])
            if isinstance(sample, Exception):
                raise sample
            finish = request.append(*sample)
            new = [(request, sample[0])]
        except Exception as error:  # noqa: BLE001 - raised again for the request's caller
            request.error, finish, new = error, "failed", []
        except BaseException:
            request.undo()
            raise
        if finish is not None:
            request.finish = finish
            self.waiting.popleft()
        return new

    def _next_logits(self, request: Request) -> Tensor:
        """Return logits `[vocab]` of the token after the request's text. An interrupt drops the cache."""
        text = request.all_tokens
        if self._cache_support == "none":
            hidden_1th = self.model(torch.tensor([text], device=self.device))
            last: Tensor = self.model.logits(hidden_1th[:, -1])[0]
            return last.clone()
        cached, past = self._cached, self._past
        if past is None or len(text) <= len(cached) or text[: len(cached)] != cached:
            cached, past = [], None
        chunk = self.prefill_chunk
        if self._cache_support == "tokens":
            chunk = len(text)
            if len(text) != len(cached) + 1:
                cached, past = [], None
        if not request.tokens:
            request.cached_tokens = len(cached)
        self._cached, self._past = [], None
        for start in range(len(cached), len(text), chunk):
            logits_v, past = self._forward(text[start : start + chunk], past)
        self._cached, self._past = text, past
        # A copy is an ordinary tensor, which the caller may change.
        return logits_v.clone()
