"""Which failures of an endpoint are worth another attempt, and how long to wait for it."""

from __future__ import annotations

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime

from koine.errors import UserError

TRANSIENT_STATUSES = frozenset({408, 409, 425, 429})
"""Besides these, every status from 500 on."""

MAY_CHARGE = frozenset({408, 499, 502, 504, 520, 524, 598, 599})
"""Statuses of a gateway that did not wait for the model's answer.

It may have come, and be charged for.
"""


def is_transient(status: int) -> bool:
    """Whether an HTTP status may be gone at the next attempt."""
    return status in TRANSIENT_STATUSES or status >= 500


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often and how patiently a call is repeated; the same seed and call give the same waits.

    attempts: calls at most, the first one included.
    first_wait: seconds before the second attempt; it doubles with each further one.
    longest_wait: seconds; the doubling ends here, and an endpoint that asks for more is given up.
    seed: of the share of chance in each wait, which keeps many calls from returning all at once.
    """

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or isinstance(self.attempts, bool) or self.attempts < 1:
            raise UserError(f"{self.attempts} attempts", hint="give at least 1")
        if not 0 <= self.first_wait <= self.longest_wait:
            raise UserError(
                f"the first wait is {self.first_wait} s and the longest {self.longest_wait} s",
                hint="give 0 or more, the longest not below the first",
            )

    def wait(self, attempt: int, *, call: str, asked: float | None) -> float | None:
        """Seconds to wait after the failed attempt number `attempt` (from 1), or None to give up.

        call: names the call; part of the seed.
        asked: what the endpoint asked for in `Retry-After`; it is never undercut.
        """
        if attempt >= self.attempts or (asked is not None and asked > self.longest_wait):
            return None
        doubled = self.first_wait * 2.0 ** min(attempt - 1, 60)
        chance = random.Random(f"{self.seed} {call} {attempt}").uniform(0.5, 1.0)
        own = min(doubled, self.longest_wait) * chance
        # A short pause of its own on top, or all that were told the same second would come back in it.
        return own if asked is None else asked + min(own, self.first_wait)


def parse_retry_after(header: str | None, *, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or an HTTP date (RFC 9110, 10.2.3).

    None where there is none or it cannot be read; 0 for a date that is past.
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
