"""Send the calls of one endpoint: rate limit, budget, retries, and checks of the responses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx2

from koine.errors import UserError
from koine.generate.engine import Completion
from koine.generate.remote.batch_state import BatchState, Charge
from koine.generate.remote.budget import Ledger
from koine.generate.remote.rate_limit import MonotonicClock, RateLimiter
from koine.generate.remote.redaction import Redactor
from koine.generate.remote.requests import Call
from koine.generate.remote.response_body import BodyError
from koine.generate.remote.response_errors import MalformedError
from koine.generate.remote.responses import ParsedResponse, error_text, parse_response, parse_usage
from koine.generate.remote.retry import MAY_CHARGE, RetryPolicy, is_transient, parse_retry_after
from koine.generate.remote.transport import NEVER_SENT, RawResponse, describe_error, send
from koine.generate.remote.url import without_credentials

REASON_CHARACTERS = 60
"""Most characters of a server's finish reason in a message."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """An attempt that may succeed when repeated.

    retry_after: seconds that the endpoint asks to wait.
    kind: set for a malformed response: equal for those that are malformed in the same way.
    """

    problem: str
    retry_after: float | None = None
    kind: str | None = None


@dataclass(frozen=True, kw_only=True)
class CallRunner:
    """Runs calls of one endpoint to their completion.

    key_variable: name of the environment variable with the key, for messages.
    timeout: seconds for a whole response.
    save: keeps a completion before its price is settled.
    resume_hint: what a user can do after the last attempt.
    """

    url: str
    model: str
    key_variable: str | None
    redactor: Redactor
    timeout: float
    retries: RetryPolicy
    limiter: RateLimiter
    ledger: Ledger | None
    clock: MonotonicClock
    sleep: Callable[[float], Awaitable[None]]
    save: Callable[[Call, Completion, BatchState], None]
    resume_hint: str

    async def complete(self, client: httpx2.AsyncClient, call: Call, state: BatchState) -> Completion:
        """Return the completion of a call, with as many attempts as the retry policy allows.

        Raises `UserError` for a failure that repeating does not fix, and after the last attempt.
        """
        attempt = 0
        malformed_kinds: set[str] = set()
        while True:
            attempt += 1
            result = await self._attempt(client, call, state)
            if isinstance(result, Completion):
                return result
            if result.kind is not None and result.kind in malformed_kinds:
                raise UserError(
                    f"{call.name}: no answer after {attempt} attempts "
                    f"({result.problem}; twice in the same way)",
                    where=self.url,
                    hint="see what the endpoint answers: more attempts would cost again",
                )
            if result.kind is not None:
                malformed_kinds.add(result.kind)
            wait = self.retries.wait(attempt, call=call.key, retry_after=result.retry_after)
            if wait is None:
                after = result.retry_after
                asked = "" if after is None else f"; it asks to come back in {after:.6g} s"
                raise UserError(
                    f"{call.name}: no answer after {attempt} attempt{'s' * (attempt > 1)} "
                    f"({result.problem}{asked})",
                    where=self.url,
                    hint=self.resume_hint,
                )
            await self._pause(wait, state)

    async def _attempt(
        self, client: httpx2.AsyncClient, call: Call, state: BatchState
    ) -> Completion | _Failure:
        """Send a call once; return the completion, or a failure that may pass.

        The cost stays unsettled in the ledger exactly where the endpoint may have charged for a response that
        never came.
        """
        await state.reserve_cost(call, self.ledger, self.url)
        charge: Charge = "nothing"
        slot = self.limiter.reserve(call.prompt_tokens + call.completion_tokens)
        try:
            await self._pause(slot.start - self.clock(), state)
            charge = "unknown"
            try:
                async with asyncio.timeout(self.timeout):
                    response = await send(client, self.url, call)
            except NEVER_SENT as error:
                charge = "nothing"
                return _Failure(problem=self.redactor.line(describe_error(error)))
            except TimeoutError:
                return _Failure(problem=f"no answer within {self.timeout:g} s")
            except BodyError as error:
                problem = f"its answer is malformed: {self.redactor.line(str(error))}"
                return _Failure(problem=problem, kind="body")
            except httpx2.RequestError as error:
                return _Failure(problem=self.redactor.line(describe_error(error)))
            # Also the tokens of a response that cannot be used are paid for.
            usage = parse_usage(response.content)
            if not 200 <= response.status < 300:
                charge = usage or ("unknown" if response.status in MAY_CHARGE else "nothing")
                return self._error_status(call, response)
            charge = usage or "unknown"
            try:
                completion = self._read_completion(call, response, state)
            except MalformedError as error:
                return self._malformed(call, error)
            if usage is None and self.ledger is not None:
                note = (
                    "do not say how many tokens they took; "
                    "the budget counts the most that they can have taken"
                )
                state.notes[note] += 1
            return completion
        finally:
            state.settle(call, charge, self.ledger)
            if charge != "unknown":
                self.limiter.settle(slot, 0 if charge == "nothing" else sum(charge))

    def _error_status(self, call: Call, response: RawResponse) -> _Failure:
        """Return the failure of an error status that may pass. Raises `UserError` for any other."""
        status = response.status
        message = self.redactor.line(error_text(response.content, response.charset))
        problem = f"HTTP {status}" + (f": {message}" if message else "")
        if is_transient(status):
            after = parse_retry_after(response.headers.get("Retry-After"), now=datetime.now(UTC))
            if status == 429 and after is not None and after <= self.retries.longest_wait:
                self.limiter.hold(after)
            return _Failure(problem=problem, retry_after=after)
        hint = None
        if status in (401, 403):
            hint = (
                "name the environment variable that holds the key"
                if self.key_variable is None
                else f"check the key in {self.key_variable}"
            )
        elif status == 404:
            hint = f"check the address and the model's name '{self.model}'"
        elif status in (301, 302, 303, 307, 308) and "Location" in response.headers:
            hint = f"give the address that it leads to: {self._redirect_target(response.headers['Location'])}"
        raise UserError(f"{call.name}: {problem}", where=self.url, hint=hint)

    def _redirect_target(self, location: str) -> str:
        """Return the target of a redirect, for a message. Nothing is sent there, least of all the key."""
        try:
            return self.redactor.line(without_credentials(location))
        except ValueError:
            return self.redactor.line(location)

    def _malformed(self, call: Call, error: MalformedError) -> _Failure:
        """Return the failure of a malformed response.

        Raises `UserError` where the server says that it will not pass.
        """
        message = self.redactor.line(error.message)
        problem = f"its answer is malformed: {error.kind}"
        if message:
            problem += f"; the endpoint says: {message}"
        if error.transient is False:
            raise UserError(f"{call.name}: {problem}", where=self.url)
        return _Failure(problem=problem, kind=None if error.transient else error.kind)

    def _read_completion(self, call: Call, response: RawResponse, state: BatchState) -> Completion:
        """Return the completion in a response, and save it.

        Raises `MalformedError`, and `UserError` for a text that ended for another reason than its end or
        length.
        """
        parsed = parse_response(response.content, max_tokens=call.completion_tokens, charset=response.charset)
        reason = self.redactor.line(parsed.reason, REASON_CHARACTERS)
        if parsed.finish is None:
            raise UserError(
                f"{call.name}: the endpoint ended the answer with '{reason}'",
                where=self.url,
                hint="leave this conversation out or change it",
            )
        text = self.redactor.completion(parsed.text)
        self._note_oddities(parsed, reason, text, state)
        completion = Completion(
            text=text,
            tokens=(),
            log_probabilities=parsed.log_probabilities,
            prompt_tokens=0 if parsed.usage is None else parsed.usage[0],
            finish=parsed.finish,
        )
        self.save(call, completion, state)
        return completion

    @staticmethod
    def _note_oddities(parsed: ParsedResponse, reason: str, text: str, state: BatchState) -> None:
        """Count what the user is warned about after the run."""
        if text != parsed.text:
            state.notes["repeated the key, which is masked"] += 1
        if parsed.unknown_reason:
            state.notes[f"ended with '{reason}', an unknown finish reason; they are taken as they are"] += 1
        if parsed.lost_log_probabilities:
            state.notes["gave log-probabilities that are not finite numbers, which are left out"] += 1

    async def _pause(self, seconds: float, state: BatchState) -> None:
        if seconds > 0:
            await state.wait_or_stop(self.sleep(seconds))
