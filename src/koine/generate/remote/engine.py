"""The engine that asks an OpenAI-compatible endpoint: the same contract as a local model."""

from __future__ import annotations

import asyncio
import math
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import get_args

import httpx2

from koine.errors import KoineWarning, UserError, did_you_mean
from koine.generate.engine import Completion
from koine.generate.messages import Message
from koine.generate.remote.budget import Budget, Ledger, Spending
from koine.generate.remote.event_loop import run_to_end
from koine.generate.remote.protocol import LengthField
from koine.generate.remote.rate_limit import RateLimiter, RateLimits, SteadyClock
from koine.generate.remote.redaction import Mask, masked_logs, proxy_passwords
from koine.generate.remote.requests import Call, CallEstimate, build_calls, missing_calls
from koine.generate.remote.response_body import ENCODINGS, BodyError
from koine.generate.remote.response_cache import AnswerCache
from koine.generate.remote.responses import MalformedError, error_text, read_answer, read_usage
from koine.generate.remote.retry import MAY_CHARGE, RetryPolicy, asked_wait, is_transient
from koine.generate.remote.sending import NEVER_SENT, Received, described, open_client, send
from koine.generate.remote.shared_state import Charge, Run, StoppedError
from koine.generate.remote.url import checked_address, key_in_environment, without_credentials
from koine.generate.sampling import Sampling

REASON_CHARACTERS = 60
"""Characters of a server's finish reason that are shown at most."""

CLAIM_SECONDS = 0.1
"""Seconds between two looks for the answer that another process asks for."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An attempt that may go better the next time.

    asked: seconds that the endpoint asks to wait.
    kind: set where the answer is malformed: the same for answers that are malformed in the same way.
    """

    problem: str
    asked: float | None = None
    kind: str | None = None


class RemoteEngine:
    """A model behind `POST {base_url}/chat/completions`.

    Answers are kept in `cache` as they come: whatever ends a run early, the next one asks only for the rest. Of a
    failure that repeating does not fix, the first in the order of the conversations is raised.
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
        _check_options(model, concurrency, timeout, length_field)
        self.model = model
        self._key_variable = api_key_variable
        key = None if api_key_variable is None else key_in_environment(api_key_variable)
        self._mask = Mask([secret for secret in (key, *proxy_passwords()) if secret])
        if self._mask.stands_in(f"{self._url} {model}".encode("utf-8", "replace")):
            raise UserError(
                "the address or the model's name holds the key", hint=f"leave it to {api_key_variable} alone"
            )
        # The library's own headers, which show no key when they are printed.
        self._headers = httpx2.Headers(
            {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": ENCODINGS}
        )
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries or RetryPolicy()
        self._log_probabilities = log_probabilities
        self._length_field: LengthField = length_field
        self._sleep = sleep
        self._clock = SteadyClock(clock)
        self._limiter = RateLimiter(limits or RateLimits(), self._clock)
        self._cache = None if cache is None else AnswerCache(Path(cache))
        self._ledger = None if budget is None else Ledger(budget, None if cache is None else Path(cache))
        # Answers that were paid for and that the disk did not take.
        self._unsaved: dict[str, tuple[Call, Completion]] = {}

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
            if self._mask.stands_in(call.content):
                raise UserError(
                    f"{call.name} holds the key, which the cache would keep",
                    hint="take it out of the messages",
                )
        return calls

    def _cached(self, calls: Sequence[Call]) -> dict[str, Completion]:
        if self._cache is None:
            return {}
        for key, (call, completion) in list(self._unsaved.items()):
            self._cache.put(key, call.request, completion)
            del self._unsaved[key]
        found = {key: self._cache.get(key) for key in dict.fromkeys(call.key for call in calls)}
        return {key: completion for key, completion in found.items() if completion is not None}

    # --- asking ---

    async def _answer_all(self, calls: Sequence[Call], known: dict[str, Completion]) -> None:
        """Put the answer to each call into `known`, `concurrency` at a time."""
        run = Run()
        waiting = iter(calls)
        with masked_logs(self._mask):
            opened = open_client(
                self._headers, timeout=self._timeout, concurrency=self._concurrency, mask=self._mask
            )
            async with opened as client:
                workers = min(self._concurrency, len(calls))
                await asyncio.gather(*(self._work(client, waiting, known, run) for _ in range(workers)))
        for note, count in run.notes.items():
            warnings.warn(f"{count} answers of {self._url} {note}", KoineWarning, stacklevel=2)
        self._tell_unsaved(run, missing=sum(call.key not in known for call in calls))
        if run.failures:
            raise min(run.failures, key=lambda failure: failure[0])[1]

    def _tell_unsaved(self, run: Run, *, missing: int) -> None:
        """Say which answers the disk did not take: an error where others are missing, too, else a warning."""
        if run.disk is None:
            return
        count = len(self._unsaved)
        what, hint = run.disk.what, run.disk.hint
        if count:
            what += f"; {count} paid answer{'s' * (count > 1)} could not be kept"
            hint = (
                f"free some space and run again; {'they are' if count > 1 else 'it is'} asked for again then"
            )
        if missing or run.failures:
            raise UserError(what, where=run.disk.where, hint=hint) from run.disk
        lost = ", and will be asked for again by the next program" if count else ""
        warnings.warn(f"{run.disk.where}: {what}{lost}", KoineWarning, stacklevel=3)

    async def _work(
        self, client: httpx2.AsyncClient, waiting: Iterator[Call], known: dict[str, Completion], run: Run
    ) -> None:
        """Take calls from `waiting` until none is left or one has failed."""
        for call in waiting:
            try:
                known[call.key] = await self._claim_and_ask(client, call, run)
            except StoppedError:
                return
            except UserError as error:
                run.failures.append((call.number, error))
                run.stopped.set()
                return
            if run.stopped.is_set():
                return

    async def _claim_and_ask(self, client: httpx2.AsyncClient, call: Call, run: Run) -> Completion:
        """The answer to one call; where another process asks for the same one, its answer is waited for."""
        if self._cache is None:
            return await self._ask(client, call, run)
        claim = self._cache.claim(call.key)
        while not claim.acquire():
            await run.first(asyncio.sleep(CLAIM_SECONDS))
        try:
            answered = self._cache.get(call.key, warn=False)
            return await self._ask(client, call, run) if answered is None else answered
        finally:
            claim.release()

    async def _ask(self, client: httpx2.AsyncClient, call: Call, run: Run) -> Completion:
        """The answer to one call, after as many attempts as the policy allows; in the cache when this returns."""
        attempt = 0
        malformed: set[str] = set()
        while True:
            attempt += 1
            result = await self._attempt(client, call, run)
            if isinstance(result, Completion):
                return result
            if result.kind is not None and result.kind in malformed:
                raise UserError(
                    f"{call.name}: no answer after {attempt} attempts ({result.problem}; twice in the same way)",
                    where=self._url,
                    hint="see what the endpoint answers: asking on would cost again",
                )
            if result.kind is not None:
                malformed.add(result.kind)
            wait = self._retries.wait(attempt, call=call.key, asked=result.asked)
            if wait is None:
                patience = "" if result.asked is None else f"; it asks to come back in {result.asked:.6g} s"
                raise UserError(
                    f"{call.name}: no answer after {attempt} attempt{'s' * (attempt > 1)} ({result.problem}{patience})",
                    where=self._url,
                    hint="run again later: what was answered is kept"
                    if self._cache
                    else "try again later, with a cache folder to keep what is answered",
                )
            await self._pause(wait, run)

    async def _attempt(self, client: httpx2.AsyncClient, call: Call, run: Run) -> Completion | _Failure:
        """Send a call once: the completion, or what went wrong that may pass.

        Money stays unsettled in the ledger exactly where the endpoint may have charged for an answer that
        never came.
        """
        await run.afford(call, self._ledger, self._url)
        charged: Charge = "nothing"
        slot = self._limiter.reserve(call.prompt_tokens + call.completion_tokens)
        try:
            await self._pause(slot.start - self._clock(), run)
            charged = "unknown"
            try:
                async with asyncio.timeout(self._timeout):
                    received = await send(client, self._url, call)
            except NEVER_SENT as error:
                charged = "nothing"
                return _Failure(problem=self._mask.line(described(error)))
            except TimeoutError:
                return _Failure(problem=f"no answer within {self._timeout:g} s")
            except BodyError as error:
                return _Failure(
                    problem=f"its answer is malformed: {self._mask.line(str(error))}", kind="body"
                )
            except httpx2.RequestError as error:
                return _Failure(problem=self._mask.line(described(error)))
            # Whatever else is wrong with the answer, its tokens were paid for.
            usage = read_usage(received.content)
            if not 200 <= received.status < 300:
                charged = usage or ("unknown" if received.status in MAY_CHARGE else "nothing")
                return self._refused(call, received)
            charged = usage or "unknown"
            try:
                completion = self._completed(call, received, run)
            except MalformedError as error:
                return self._malformed(call, error)
            if usage is None and self._ledger is not None:
                run.notes["do not say how many tokens they took; the budget counts the most that they can have taken"] += 1  # fmt: skip
            return completion
        finally:
            run.settle(call, charged, self._ledger)
            if charged != "unknown":
                self._limiter.settle(slot, 0 if charged == "nothing" else sum(charged))

    def _refused(self, call: Call, received: Received) -> _Failure:
        """A response with an error status: what it says, where it may pass. Raises `UserError` where it will not."""
        status = received.status
        said = self._mask.line(error_text(received.content, received.charset))
        problem = f"HTTP {status}" + (f": {said}" if said else "")
        if is_transient(status):
            asked = asked_wait(received.headers.get("Retry-After"), now=datetime.now(UTC))
            if status == 429 and asked is not None and asked <= self._retries.longest_wait:
                self._limiter.hold(asked)
            return _Failure(problem=problem, asked=asked)
        hint = None
        if status in (401, 403):
            hint = (
                "name the environment variable that holds the key"
                if self._key_variable is None
                else f"check the key in {self._key_variable}"
            )
        elif status == 404:
            hint = f"check the address and the model's name '{self.model}'"
        elif status in (301, 302, 303, 307, 308) and "Location" in received.headers:
            hint = f"give the address that it leads to: {self._place(received.headers['Location'])}"
        raise UserError(f"{call.name}: {problem}", where=self._url, hint=hint)

    def _place(self, location: str) -> str:
        """The target of a redirect, for a message; nothing is sent there, least of all the key."""
        try:
            return self._mask.line(without_credentials(location))
        except ValueError:
            return self._mask.line(location)

    def _malformed(self, call: Call, error: MalformedError) -> _Failure:
        """An answer that cannot be used.

        Raises `UserError` where the server says that it always will be so.
        """
        said = self._mask.line(error.said)
        problem = f"its answer is malformed: {error.kind}" + (f"; the endpoint says: {said}" if said else "")
        if error.passing is False:
            raise UserError(f"{call.name}: {problem}", where=self._url)
        return _Failure(problem=problem, kind=None if error.passing else error.kind)

    def _completed(self, call: Call, received: Received, run: Run) -> Completion:
        """The completion in a response, put into the cache. Raises `MalformedError`, and `UserError` for a strange end."""
        answer = read_answer(received.content, most_tokens=call.completion_tokens, charset=received.charset)
        reason = self._mask.line(answer.reason, REASON_CHARACTERS)
        if answer.finish is None:
            raise UserError(
                f"{call.name}: the endpoint ended the answer with '{reason}'",
                where=self._url,
                hint="leave this conversation out or change it",
            )
        text = self._mask.answer(answer.text)
        if text != answer.text:
            run.notes["repeated the key, which is masked"] += 1
        if answer.strange_end:
            run.notes[
                f"ended with '{reason}', which is no word that is known; they are taken as they are"
            ] += 1
        if answer.lost_log_probabilities:
            run.notes["gave log-probabilities that are no finite numbers, which are left out"] += 1
        completion = Completion(
            text=text,
            tokens=(),
            log_probabilities=answer.log_probabilities,
            prompt_tokens=0 if answer.usage is None else answer.usage[0],
            finish=answer.finish,
        )
        if self._cache is not None:
            try:
                self._cache.put(call.key, call.request, completion)
            except UserError as error:
                self._unsaved[call.key] = (call, completion)
                run.disk = error
                run.stopped.set()
        return completion

    async def _pause(self, seconds: float, run: Run) -> None:
        if seconds > 0:
            await run.first(self._sleep(seconds))


def _check_options(model: str, concurrency: int, timeout: float, length_field: str) -> None:
    if not isinstance(model, str) or not model.strip():
        raise UserError("no model is named", hint="give the name that the endpoint knows it by")
    if not isinstance(concurrency, int) or isinstance(concurrency, bool) or concurrency < 1:
        raise UserError(f"concurrency is {concurrency}", hint="give an integer from 1")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:
        raise UserError(f"timeout is {timeout}", hint="give seconds, more than 0")
    if length_field not in get_args(LengthField):
        raise UserError(
            f"length_field is '{length_field}'", hint=did_you_mean(str(length_field), get_args(LengthField))
        )
