"""Keep below an endpoint's rate limits: requests and tokens in any minute."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from koine.fields import check_integer

WINDOW_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """The endpoint's limits; None for no limit. Tokens are those of prompt and completion together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None:
                check_integer(name, value, low=1)


@dataclass
class Slot:
    """A scheduled request: when it may be sent, and the tokens that count for it."""

    start: float
    tokens: int


class MonotonicClock:
    """A clock that never goes back, also where the clock below it is set back."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._ahead = 0.0
        self._latest = clock()

    def __call__(self) -> float:
        now = self._clock() + self._ahead
        if now < self._latest:
            self._ahead += self._latest - now
            now = self._latest
        self._latest = now
        return now


class RateLimiter:
    """A sliding window over the last minute. Requests are sent in the order of `reserve`. Thread-safe."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float]) -> None:
        """clock: returns seconds, and never goes back."""
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: deque[Slot] = deque()
        self._not_before = 0.0

    def reserve(self, tokens: int) -> Slot:
        """Schedule a request of at most `tokens` tokens at the first time within the limits.

        A request that exceeds a minute's tokens gets a window to itself: only the endpoint knows whether it
        accepts it.
        """
        with self._lock:
            now = self._clock()
            while self._slots and self._slots[0].start <= now - WINDOW_SECONDS:
                self._slots.popleft()
            start = max(now, self._not_before)
            if self._slots:
                start = max(start, self._slots[-1].start)
            start = max(start, self._request_limit_free(), self._token_limit_free(tokens))
            slot = Slot(start, tokens)
            self._slots.append(slot)
            return slot

    def settle(self, slot: Slot, tokens: int) -> None:
        """Correct the tokens of a slot to those that it took."""
        with self._lock:
            slot.tokens = tokens

    def hold(self, seconds: float) -> None:
        """Schedule no further request within the next `seconds`."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def _request_limit_free(self) -> float:
        """Return the time from which the request limit allows one more."""
        limit = self._limits.requests_per_minute
        if limit is None or len(self._slots) < limit:
            return 0.0
        return self._slots[-limit].start + WINDOW_SECONDS

    def _token_limit_free(self, tokens: int) -> float:
        """Return the time from which the token limit allows `tokens` more."""
        limit = self._limits.tokens_per_minute
        if limit is None:
            return 0.0
        room = limit - tokens
        for slot in reversed(self._slots):
            room -= slot.tokens
            if room < 0:
                return slot.start + WINDOW_SECONDS
        return 0.0
