"""Decide which failures of an endpoint are retried, and how long to wait."""

from __future__ import annotations

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime

from koine.errors import UserError
from koine.fields import check_integer

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
"""Statuses that are retried, besides all from 500 on."""

MAY_CHARGE = frozenset({408, 499, 502, 504, 520, 524, 598, 599})
"""Statuses of a gateway that did not wait for the model: the response may exist and be charged for."""


def is_transient(status: int) -> bool:
    """Return whether an HTTP status may change at the next attempt."""
    return status in TRANSIENT_STATUSES or status >= 500


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter. The same seed and call give the same waits.

    attempts: most attempts, the first included.
    first_wait: seconds before the second attempt; it doubles with each further one.
    longest_wait: most seconds between attempts; an endpoint that asks for a longer wait is given up.
    seed: random seed of the jitter, which keeps many calls from retrying at the same time.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("attempts", self.attempts, low=1)
        if not 0 <= self.first_wait <= self.longest_wait:
            raise UserError(
                f"the first wait is {self.first_wait} s and the longest {self.longest_wait} s",
                hint="give 0 or more, the longest not below the first",
            )

    def wait(self, attempt: int, *, call: str, retry_after: float | None) -> float | None:
        """Return the seconds to wait after failed attempt number `attempt` (from 1), or None to give up.

        call: the call's key, part of the random seed.
        retry_after: seconds in the endpoint's `Retry-After`; the wait is never shorter.
        """
        if attempt >= self.attempts or (retry_after is not None and retry_after > self.longest_wait):
            return None
        doubled = self.first_wait * 2.0 ** min(attempt - 1, 60)
        jitter = random.Random(f"{self.seed} {call} {attempt}").uniform(0.5, 1.0)
        own = min(doubled, self.longest_wait) * jitter
        # A short wait of its own on top: else all calls with the same `Retry-After` would retry at once.
        return own if retry_after is None else retry_after + min(own, self.first_wait)


def parse_retry_after(header: str | None, *, now: datetime) -> float | None:
    """Return the seconds of a `Retry-After` header: a number, or an HTTP date (RFC 9110, 10.2.3).

    None where it is missing or cannot be parsed, 0 for a date in the past.
    """
    if header is None:
        return None
    text = header.strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - now).total_seconds()
        return max(0.0, seconds)
    return seconds if 0 <= seconds < float("inf") else None
