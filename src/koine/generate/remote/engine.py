"""Generate with an OpenAI-compatible endpoint: the same contract as a local model."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import get_args

import httpx2

from koine.errors import KoineWarning, UserError
from koine.fields import check_choice, check_integer, check_number
from koine.generate.engine import Completion
from koine.generate.messages import Message
from koine.generate.remote.batch_state import BatchState, StoppedError
from koine.generate.remote.budget import Budget, Ledger, Spending
from koine.generate.remote.call_runner import CallRunner
from koine.generate.remote.event_loop import run_coroutine
from koine.generate.remote.protocol import LengthField
from koine.generate.remote.rate_limit import MonotonicClock, RateLimiter, RateLimits
from koine.generate.remote.redaction import Redactor, proxy_passwords, redact_logs
from koine.generate.remote.requests import Call, CallEstimate, build_calls, missing_calls
from koine.generate.remote.response_body import ENCODINGS
from koine.generate.remote.response_cache import ResponseCache
from koine.generate.remote.retry import RetryPolicy
from koine.generate.remote.transport import open_client
from koine.generate.remote.url import check_url, read_api_key
from koine.generate.sampling import Sampling

POLL_SECONDS = 0.1
"""Seconds between two looks for a response that another process has requested."""


class RemoteEngine:
    """A model behind `POST {base_url}/chat/completions`.

    Completions are saved in `cache` as they arrive: whatever ends a run early, the next run requests only the
    rest. Of failures that repeating does not fix, the first in the order of the conversations is raised.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_variable: str | None = None,
        cache: Path | None = None,
        concurrency: int = 8,
        limits: RateLimits | None = None,
        budget: Budget | None = None,
        retries: RetryPolicy | None = None,
        timeout: float = 120.0,
        log_probabilities: bool = True,
        length_field: LengthField = "max_tokens",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Check the options. Nothing is sent yet.

        Args:
            base_url: the part before `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
            model: the endpoint's name of the model.
            api_key_variable: environment variable with the key; None sends no key.
            cache: folder for completions and the ledger of the budget; None keeps both in memory only.
            concurrency: requests in flight at a time.
            limits: rate limits of the endpoint.
            budget: prices and a ceiling.
            retries: number of attempts, and waits between them.
            timeout: seconds for a whole response.
            log_probabilities: request them; some endpoints refuse that.
            length_field: the endpoint's name of the maximum length; OpenAI's reasoning models know only the
                newer.
            clock, sleep: replaced in tests.

        Raises:
            UserError: an option is out of range, the variable is not set, or the ledger is damaged.
        """
        self._url = check_url(base_url) + "/chat/completions"
        if not isinstance(model, str) or not model.strip():
            raise UserError("no model is named", hint="give the name that the endpoint knows it by")
        check_integer("concurrency", concurrency, low=1)
        check_number("timeout", timeout, above=0)
        check_choice("length_field", length_field, get_args(LengthField))
        self.model = model
        key = None if api_key_variable is None else read_api_key(api_key_variable)
        redactor = Redactor([secret for secret in (key, *proxy_passwords()) if secret])
        if redactor.occurs_in(f"{self._url} {model}".encode("utf-8", "replace")):
            raise UserError(
                "the address or the model's name holds the key", hint=f"leave it to {api_key_variable} alone"
            )
        # The library's own class, which hides the key when it is printed.
        self._headers = httpx2.Headers(
            {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": ENCODINGS}
        )
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._concurrency = concurrency
        self._log_probabilities = log_probabilities
        self._length_field: LengthField = length_field
        self._cache = None if cache is None else ResponseCache(Path(cache))
        self._ledger = None if budget is None else Ledger(budget, None if cache is None else Path(cache))
        # Completions that were paid for and that could not be written to disk.
        self._unsaved: dict[str, tuple[Call, Completion]] = {}
        steady = MonotonicClock(clock)
        self._runner = CallRunner(
            url=self._url,
            model=model,
            key_variable=api_key_variable,
            redactor=redactor,
            timeout=timeout,
            retries=retries or RetryPolicy(),
            limiter=RateLimiter(limits or RateLimits(), steady),
            ledger=self._ledger,
            clock=steady,
            sleep=sleep,
            save=self._save,
            resume_hint="run again later: what was answered is kept"
            if self._cache
            else "try again later, with a cache folder to keep what is answered",
        )

    def spending(self) -> Spending | None:
        """Return the totals of the cache folder's ledger; None without a budget."""
        return None if self._ledger is None else self._ledger.spending()

    def estimate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> CallEstimate:
        """Return what `generate` with the same arguments would need. Nothing is sent."""
        calls = self._build_calls(conversations, sampling)
        missing = missing_calls(calls, self._cached(calls))
        return CallEstimate(
            calls=len(missing),
            cached=len({call.key for call in calls}) - len(missing),
            prompt_tokens=sum(call.prompt_tokens for call in missing),
            completion_tokens=sum(call.completion_tokens for call in missing),
            cost=None if self._ledger is None else sum((call.cost for call in missing), Decimal(0)),
        )

    @property
    def url(self) -> str:
        """Where requests go: with `model`, it says which model answers."""
        return self._url

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """Return one completion for each conversation, in order; conversation i samples with `seed + i`.

        `tokens` are empty, because an endpoint does not report ids. `log_probabilities` are the endpoint's,
        empty where it gives none. `prompt_tokens` is 0 where it does not count them.

        The cache is keyed by content: model, address, messages, settings, seed. Without a seed and above
        temperature 0, the same conversation given twice is sampled twice, and the cache knows its first,
        second, ...
        sample: running the same again costs nothing and gives the same. For new samples give another seed.

        Raises:
            UserError: the endpoint refuses a call, does not answer after all attempts, or ends a text for
                another reason than its end or its length; or a call might pass the budget's ceiling.
        """
        calls = self._build_calls(conversations, sampling)
        known = self._cached(calls)
        missing = missing_calls(calls, known)
        if missing:
            run_coroutine(self._complete_all(missing, known))
        return [known[call.key] for call in calls]

    def _build_calls(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Call]:
        """Return one call for each conversation. Raises `UserError` for one that holds the key."""
        calls = build_calls(
            conversations,
            sampling,
            url=self._url,
            model=self.model,
            length_field=self._length_field,
            log_probabilities=self._log_probabilities,
            budget=None if self._ledger is None else self._ledger.budget,
        )
        for call in calls:
            if self._runner.redactor.occurs_in(call.content):
                raise UserError(
                    f"{call.name} holds the key, which the cache would keep",
                    hint="take it out of the messages",
                )
        return calls

    def _cached(self, calls: Sequence[Call]) -> dict[str, Completion]:
        """Return the completions in the cache, by key. Unsaved ones are written to it first."""
        if self._cache is None:
            return {}
        for key, (call, completion) in list(self._unsaved.items()):
            self._cache.put(key, call.request, completion)
            del self._unsaved[key]
        found = {key: self._cache.get(key) for key in dict.fromkeys(call.key for call in calls)}
        return {key: completion for key, completion in found.items() if completion is not None}

    def _save(self, call: Call, completion: Completion, state: BatchState) -> None:
        """Write a completion to the cache. Where the disk fails, no further call starts."""
        if self._cache is None:
            return
        try:
            self._cache.put(call.key, call.request, completion)
        except UserError as error:
            self._unsaved[call.key] = (call, completion)
            state.disk_error = error
            state.stopped.set()

    async def _complete_all(self, calls: Sequence[Call], known: dict[str, Completion]) -> None:
        """Put the completion of each call into `known`, `concurrency` calls at a time."""
        state = BatchState()
        waiting = iter(calls)
        redactor = self._runner.redactor
        with redact_logs(redactor):
            opened = open_client(
                self._headers,
                timeout=self._runner.timeout,
                concurrency=self._concurrency,
                redactor=redactor,
            )
            async with opened as client:
                workers = min(self._concurrency, len(calls))
                await asyncio.gather(*(self._work(client, waiting, known, state) for _ in range(workers)))
        for note, count in state.notes.items():
            warnings.warn(f"{count} answers of {self._url} {note}", KoineWarning, stacklevel=2)
        self._report_unsaved(state, missing=sum(call.key not in known for call in calls))
        if state.failures:
            raise min(state.failures, key=lambda failure: failure[0])[1]

    def _report_unsaved(self, state: BatchState, *, missing: int) -> None:
        """Report unsaved completions: an error where others are missing too, else a warning."""
        error = state.disk_error
        if error is None:
            return
        count = len(self._unsaved)
        what, hint = error.what, error.hint
        if count:
            what += f"; {count} paid answer{'s' * (count > 1)} could not be kept"
            hint = (
                f"free some space and run again; {'they are' if count > 1 else 'it is'} requested again then"
            )
        if missing or state.failures:
            raise UserError(what, where=error.where, hint=hint) from error
        lost = ", and will be requested again by the next program" if count else ""
        warnings.warn(f"{error.where}: {what}{lost}", KoineWarning, stacklevel=3)

    async def _work(
        self,
        client: httpx2.AsyncClient,
        waiting: Iterator[Call],
        known: dict[str, Completion],
        state: BatchState,
    ) -> None:
        """Complete calls from `waiting` until none is left or one has failed."""
        for call in waiting:
            try:
                known[call.key] = await self._complete_once(client, call, state)
            except StoppedError:
                return
            except UserError as error:
                state.failures.append((call.number, error))
                state.stopped.set()
                return
            if state.stopped.is_set():
                return

    async def _complete_once(self, client: httpx2.AsyncClient, call: Call, state: BatchState) -> Completion:
        """Complete one call. Where another process has requested the same, wait for its response."""
        if self._cache is None:
            return await self._runner.complete(client, call, state)
        lock = self._cache.lock(call.key)
        while not lock.acquire():
            await state.wait_or_stop(asyncio.sleep(POLL_SECONDS))
        try:
            cached = self._cache.get(call.key, warn=False)
            return await self._runner.complete(client, call, state) if cached is None else cached
        finally:
            lock.release()
