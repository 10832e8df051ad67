"""Keeping below an endpoint's limits: so many requests and so many tokens in any minute."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from koine.errors import UserError

WINDOW_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What the endpoint grants; None is without limit. Tokens are those of prompt and answer together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise UserError(f"{name} is {value}", hint="give an integer from 1, or None for no limit")


@dataclass
class Slot:
    """A place in the schedule: when the request may go out, and the tokens that it is counted with."""

    start: float
    tokens: int


class SteadyClock:
    """A clock that never goes back.

    Where the one below it does (a clock set by hand), it goes on from where it was.
    """

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
    """A sliding window over the last minute; requests go out in the order in which they asked. Thread-safe."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float]) -> None:
        """clock: seconds, never going back."""
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: deque[Slot] = deque()
        self._not_before = 0.0

    def reserve(self, tokens: int) -> Slot:
        """The first moment at which a request of at most `tokens` tokens keeps every window within the limits.

        A request that is larger than a whole minute's tokens gets a window to itself: only the endpoint knows
        whether it takes it.
        """
        with self._lock:
            now = self._clock()
            while self._slots and self._slots[0].start <= now - WINDOW_SECONDS:
                self._slots.popleft()
            start = max(now, self._not_before)
            if self._slots:
                start = max(start, self._slots[-1].start)
            start = max(start, self._free_of_requests(), self._free_of_tokens(tokens))
            slot = Slot(start, tokens)
            self._slots.append(slot)
            return slot

    def settle(self, slot: Slot, tokens: int) -> None:
        """Count `slot` with the tokens that it really took."""
        with self._lock:
            slot.tokens = tokens

    def hold(self, seconds: float) -> None:
        """Let no request that has not been scheduled yet out within the next `seconds`."""
        with self._lock:
            self._not_before = max(self._not_before, self._clock() + seconds)

    def _free_of_requests(self) -> float:
        """When fewer requests than allowed lie in the window before."""
        limit = self._limits.requests_per_minute
        if limit is None or len(self._slots) < limit:
            return 0.0
        return self._slots[-limit].start + WINDOW_SECONDS

    def _free_of_tokens(self, tokens: int) -> float:
        """When `tokens` more fit into the window before."""
        limit = self._limits.tokens_per_minute
        if limit is None:
            return 0.0
        room = limit - tokens
        for slot in reversed(self._slots):
            room -= slot.tokens
            if room < 0:
                return slot.start + WINDOW_SECONDS
        return 0.0
