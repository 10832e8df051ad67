"""The engine that asks an OpenAI-compatible endpoint: the same contract as a local model."""

from __future__ import annotations

import asyncio
import math
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, cast

import httpx2

from koine.errors import KoineWarning, UserError
from koine.serve.address import checked_address, key_in_environment
from koine.serve.answer_cache import AnswerCache
from koine.serve.background import run_to_end
from koine.serve.budget import Budget, Ledger, Spending
from koine.serve.calls import Call, CallEstimate, build_calls, missing_calls
from koine.serve.conversation import Message
from koine.serve.engine import Completion
from koine.serve.rate_limit import RateLimiter, RateLimits
from koine.serve.retry import RetryPolicy, asked_wait, is_transient
from koine.serve.sampling import Sampling
from koine.serve.wire import (
    LengthField,
    MalformedError,
    error_message,
    read_answer,
    read_usage,
)

CONNECT_SECONDS = 10.0

# Nothing reached the endpoint, so nothing can have been charged.
NEVER_SENT = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


@dataclass
class _Run:
    """What the calls of one `generate` share, all inside one event loop.

    settled: set whenever a call no longer holds money back.
    stopped: set when a call has failed for good: no other is begun, those under way are let finish.
    """

    settled: asyncio.Event = field(default_factory=asyncio.Event)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    holding_money: int = 0
    without_usage: int = 0
    failures: list[tuple[int, UserError]] = field(default_factory=list)


class _StoppedError(Exception):
    """Another call has failed; this one is not begun, or not repeated."""


class RemoteEngine:
    """A model behind `POST {base_url}/chat/completions`.

    Answers are kept in `cache` as they come: whatever ends a run early, the next one asks only for the rest. Of a
    failure that repeating does not mend, the first in the order of the conversations is raised.
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
        """Sends nothing yet.

        base_url: up to what comes before `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
        api_key_variable: the environment variable that holds the key; None sends none.
        cache: a folder for answers and the ledger of the budget; None keeps neither beyond this object.
        concurrency: requests under way at a time.
        timeout: seconds for a whole answer.
        log_probabilities: ask for them; some endpoints refuse the question.
        length_field: what the endpoint calls the longest answer; OpenAI's reasoning models know only the newer name.
        clock, sleep: where time comes from.
        Raises `UserError` for an option out of range, a variable that is not set, or a damaged ledger.
        """
        self._url = checked_address(base_url) + "/chat/completions"
        if not model:
            raise UserError("no model is named", mend="give the name that the endpoint knows it by")
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}", mend="give at least 1")
        if not 0 < timeout < math.inf:
            raise UserError(f"timeout is {timeout}", mend="give seconds, more than 0")
        self.model = model
        self._key_variable = api_key_variable
        self._key = None if api_key_variable is None else key_in_environment(api_key_variable)
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries or RetryPolicy()
        self._log_probabilities = log_probabilities
        self._length_field: LengthField = length_field
        self._sleep = sleep
        self._clock = clock
        self._limiter = RateLimiter(limits or RateLimits(), clock)
        self._cache = None if cache is None else AnswerCache(Path(cache))
        self._ledger = None if budget is None else Ledger(budget, None if cache is None else Path(cache))

    def spending(self) -> Spending | None:
        """What the ledger of the cache folder holds; None without a budget."""
        return None if self._ledger is None else self._ledger.spending()

    def estimate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> CallEstimate:
        """What `generate` with the same arguments would need, found without sending anything."""
        calls = self._calls(conversations, sampling)
        missing = missing_calls(calls, self._cached(calls))
        return CallEstimate(
            calls=len(missing),
            cached=len({call.key for call in calls}) - len(missing),
            prompt_tokens=sum(call.prompt_tokens for call in missing),
            completion_tokens=sum(call.completion_tokens for call in missing),
            cost=None if self._ledger is None else sum((call.cost for call in missing), Decimal(0)),
        )

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        """One completion for each conversation, in order; conversation i is drawn with `seed + i`.

        `tokens` are empty: an endpoint does not tell its ids. `log_probabilities` are what the endpoint gives, empty
        where it gives none; `prompt_tokens` is 0 where it does not count them.

        The cache goes by content: model, address, messages, settings, seed. Without a seed and above temperature 0,
        the same conversation given twice is drawn twice, and the cache knows the first, the second, ... draw of it:
        running the same again costs nothing and gives the same. For fresh answers give another seed.

        Raises `UserError` where the endpoint refuses a call, does not answer after all attempts, ends an answer for
        another reason than its end or its length, or where a call might pass the budget's ceiling.
        """
        calls = self._calls(conversations, sampling)
        known = self._cached(calls)
        missing = missing_calls(calls, known)
        if missing:
            run_to_end(self._answer_all(missing, known))
        return [known[call.key] for call in calls]

    def _calls(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Call]:
        return build_calls(
            conversations,
            sampling,
            url=self._url,
            model=self.model,
            length_field=self._length_field,
            log_probabilities=self._log_probabilities,
            budget=None if self._ledger is None else self._ledger.budget,
        )

    def _cached(self, calls: Sequence[Call]) -> dict[str, Completion]:
        if self._cache is None:
            return {}
        found = {key: self._cache.get(key) for key in dict.fromkeys(call.key for call in calls)}
        return {key: completion for key, completion in found.items() if completion is not None}

    # --- asking ---

    async def _answer_all(self, calls: Sequence[Call], known: dict[str, Completion]) -> None:
        """Put the answer to each call into `known`, `concurrency` at a time."""
        run = _Run()
        waiting = iter(calls)
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        async with httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, self._timeout)),
            limits=httpx2.Limits(max_connections=self._concurrency),
        ) as client:
            workers = min(self._concurrency, len(calls))
            await asyncio.gather(*(self._work(client, waiting, known, run) for _ in range(workers)))
        if run.failures:
            raise min(run.failures, key=lambda failure: failure[0])[1]
        if run.without_usage:
            warnings.warn(
                f"{run.without_usage} answers of {self._url} do not say how many tokens they took; the budget counts the "
                "most that they can have taken",
                KoineWarning,
                stacklevel=2,
            )

    async def _work(
        self, client: httpx2.AsyncClient, waiting: Iterator[Call], known: dict[str, Completion], run: _Run
    ) -> None:
        """Take calls from `waiting` until none is left or one has failed."""
        for call in waiting:
            try:
                known[call.key] = await self._ask(client, call, run)
            except _StoppedError:
                return
            except UserError as error:
                run.failures.append((call.number, error))
                run.stopped.set()
                return
            if run.stopped.is_set():
                return

    async def _ask(self, client: httpx2.AsyncClient, call: Call, run: _Run) -> Completion:
        """The answer to one call, after as many attempts as the policy allows; in the cache when this returns."""
        attempt = 0
        while True:
            attempt += 1
            problem, asked = await self._attempt(client, call, run)
            if isinstance(problem, Completion):
                return problem
            wait = self._retries.wait(attempt, call=call.key, asked=asked)
            if wait is None:
                patience = "" if asked is None else f"; it asks to come back in {asked:.0f} s"
                raise UserError(
                    f"{call.name}: no answer after {attempt} attempt{'s' * (attempt > 1)} ({problem}{patience})",
                    where=self._url,
                    mend="run again later: what was answered is kept"
                    if self._cache
                    else "try again later, with a cache folder to keep what is answered",
                )
            await self._pause(wait, run)

    async def _attempt(
        self, client: httpx2.AsyncClient, call: Call, run: _Run
    ) -> tuple[Completion | str, float | None]:
        """Send a call once: the completion; or what went wrong that may pass, and how long the endpoint asks to wait.

        Money stays unsettled in the ledger exactly where the endpoint may have charged for an answer that never came.
        """
        await self._afford(call, run)
        charged: tuple[int, int] | Literal["nothing", "unknown"] = "nothing"
        slot = self._limiter.reserve(call.prompt_tokens + call.completion_tokens)
        try:
            await self._pause(slot.start - self._clock(), run)
            charged = "unknown"
            try:
                async with asyncio.timeout(self._timeout):
                    response = await client.post(self._url, content=call.content)
            except NEVER_SENT as error:
                charged = "nothing"
                return _described(error), None
            except TimeoutError:
                return f"no answer within {self._timeout:g} s", None
            except httpx2.RequestError as error:
                return _described(error), None
            if not response.is_success:
                charged = "nothing"
                return self._refused(call, response)
            # Whatever else is wrong with the answer, its tokens were paid for.
            usage = read_usage(response.content)
            charged = usage or "unknown"
            try:
                completion = self._completed(call, response.content)
            except MalformedError as error:
                return f"its answer is malformed: {error}", None
            run.without_usage += usage is None and self._ledger is not None
            return completion, None
        finally:
            self._settle(call, charged, run)
            if charged != "unknown":
                self._limiter.settle(slot, 0 if charged == "nothing" else sum(charged))

    def _refused(self, call: Call, response: httpx2.Response) -> tuple[str, float | None]:
        """A response with an error status: what it says, where it may pass. Raises `UserError` where it will not."""
        status = response.status_code
        said = error_message(response.content)
        if self._key is not None:
            said = said.replace(self._key, "***")
        problem = f"HTTP {status}" + (f": {said}" if said else "")
        if is_transient(status):
            asked = asked_wait(response.headers.get("Retry-After"), now=datetime.now(UTC))
            if status == 429 and asked is not None and asked <= self._retries.longest_wait:
                self._limiter.hold(asked)
            return problem, asked
        mend = None
        if status in (401, 403):
            mend = (
                "name the environment variable that holds the key"
                if self._key is None
                else f"check the key in {self._key_variable}"
            )
        elif status == 404:
            mend = f"check the address and the model's name '{self.model}'"
        elif response.is_redirect:
            mend = f"give the address that it leads to: {response.headers.get('Location')}"
        raise UserError(f"{call.name}: {problem}", where=self._url, mend=mend)

    def _completed(self, call: Call, content: bytes) -> Completion:
        """The completion in a response, put into the cache. Raises `MalformedError`, and `UserError` for a strange end."""
        answer = read_answer(content)
        if answer.finish not in ("stop", "length"):
            raise UserError(
                f"{call.name}: the endpoint ended the answer with '{answer.finish}'",
                where=self._url,
                mend="leave this conversation out or change it",
            )
        completion = Completion(
            text=answer.text,
            tokens=(),
            log_probabilities=answer.log_probabilities,
            prompt_tokens=0 if answer.usage is None else answer.usage[0],
            finish=cast(Literal["stop", "length"], answer.finish),
        )
        if self._cache is not None:
            self._cache.put(call.key, call.request, completion)
        return completion

    # --- money and time ---

    async def _afford(self, call: Call, run: _Run) -> None:
        """Hold the call's worst case back; where that would pass the ceiling, wait for calls under way to cost less."""
        if run.stopped.is_set():
            raise _StoppedError
        if self._ledger is None:
            return
        while not self._ledger.reserve(call.cost):
            if run.holding_money == 0:
                now = self._ledger.spending()
                raise UserError(
                    f"{call.name}: it may cost {call.cost:f}, and with {now.at_most:f} spent that would pass the ceiling "
                    f"of {self._ledger.budget.ceiling:f}",
                    where=self._url,
                    mend="raise the ceiling, shorten the answers, or ask less",
                )
            run.settled.clear()
            await _first(run.settled.wait(), run)
        run.holding_money += 1

    def _settle(
        self, call: Call, charged: tuple[int, int] | Literal["nothing", "unknown"], run: _Run
    ) -> None:
        if self._ledger is None:
            return
        if charged == "nothing":
            self._ledger.release(call.cost)
        elif charged != "unknown":
            self._ledger.settle(call.cost, prompt_tokens=charged[0], completion_tokens=charged[1])
        run.holding_money -= 1
        run.settled.set()

    async def _pause(self, seconds: float, run: _Run) -> None:
        if seconds > 0:
            await _first(self._sleep(seconds), run)


async def _first(waited: Awaitable[Any], run: _Run) -> None:
    """Wait for `waited`, but no longer than the run goes on (`_StoppedError`)."""
    tasks = [asyncio.ensure_future(waited), asyncio.ensure_future(run.stopped.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if run.stopped.is_set():
            raise _StoppedError
    finally:
        for task in tasks:
            task.cancel()


def _described(error: Exception) -> str:
    name = type(error).__name__
    return f"{name}: {error}" if str(error) else name
