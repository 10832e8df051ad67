"""Requests answered one at a time by any causal LM of transformers, with the cache that it makes itself.

The same interface as `koine.generate.scheduler.Scheduler`: what serves answers need not know which of the two it has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from koine.generate.kv_cache_probe import cache_name, continuing
from koine.generate.request import Finish, Request, TokenGrammar, choose_next, new_request
from koine.generate.token_sampling import Sampling
from koine.model.causal_lm import CausalLM


class SequentialGenerator:
    """Answers requests in the order in which they came. A prompt that goes on from the text read last is not
    read again, where the model's cache allows that (`koine.generate.kv_cache_probe`)."""

    def __init__(self, model: CausalLM, *, prefill_chunk: int = 2048) -> None:
        self.model, self.prefill_chunk = model, prefill_chunk
        self.device, self.vocabulary = next(model.parameters()).device, model.vocab_size
        self.waiting: deque[Request] = deque()
        self._read: list[int] = []
        self._past: Any = None
        self._cache_name = str(cache_name(model.inner))
        with torch.inference_mode():
            self._continuing = continuing(model.inner)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int], bool] | None = None,
        grammar: TokenGrammar | None = None,
    ) -> Request:
        """Queue a prompt. Raises `UserError` where it is empty or holds an id that the model lacks."""
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
        """Stop a request wherever it is; what it has stays in it."""
        if request.finish is None:
            request.finish = "cancelled"
            self.waiting.remove(request)

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self.waiting)

    def run(self) -> None:
        """Step until every request is finished; then raise what the first of those that failed, if any, failed with."""
        unfinished = list(self.waiting)
        while self.busy:
            self.step()
        for request in unfinished:
            request.raise_error()

    def step(self) -> list[tuple[Request, int]]:
        """The next token of the oldest request. What reading, drawing, its grammar or its `on_token` raises is the request's: its `finish` is
        "failed" and `error` what was raised. Interrupted, a draw that was not taken is undone."""
        if not self.waiting:
            return []
        request = self.waiting[0]
        finish: Finish | None
        try:
            with torch.inference_mode():
                logits = self._read_up_to(request)
                [choice] = choose_next([request], logits[None])
            if isinstance(choice, Exception):
                raise choice
            finish = request.take(*choice)
            new = [(request, choice[0])]
        except Exception as error:  # noqa: BLE001 - the request's caller gets it
            request.error, finish, new = error, "failed", []
        except BaseException:
            request.undo()
            raise
        if finish is not None:
            request.finish = finish
            self.waiting.popleft()
        return new

    def _read_up_to(self, request: Request) -> Tensor:
        """Logits `[vocab]` after the request's text. Interrupted, it forgets everything rather than half a token."""
        text = request.text
        if self._continuing == "none":
            hidden = self.model(torch.tensor([text], device=self.device))
            last: Tensor = self.model.logits(hidden[:, -1])[0]
            return last.clone()
        read, past = self._read, self._past
        if past is None or len(text) <= len(read) or text[: len(read)] != read:
            read, past = [], None
        chunk = self.prefill_chunk
        if self._continuing == "tokens":
            chunk = len(text)
            if len(text) != len(read) + 1:
                read, past = [], None
        if not request.tokens:
            request.reused = len(read)
        self._read, self._past = [], None
        for start in range(len(read), len(text), chunk):
            ids = torch.tensor([text[start : start + chunk]], device=self.device)
            out = self.model.inner(input_ids=ids, use_cache=True, **{self._cache_name: past})
            past = getattr(out, self._cache_name)
        self._read, self._past = text, past
        # A copy is an ordinary tensor, which the caller may change.
        logits: Tensor = out.logits[0, -1].clone()
        return logits
