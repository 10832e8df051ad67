"""No minute ever holds more requests or tokens than the limits allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koine.errors import UserError
from koine.generate.remote.rate_limit import WINDOW_SECONDS, MonotonicClock, RateLimiter, RateLimits


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), max_size=30),
    st.integers(1, 6),
    st.integers(50, 150),
)
def test_every_window_keeps_the_limits(arrivals: list[tuple[int, int]], requests: int, tokens: int) -> None:
    clock = Clock()
    limiter = RateLimiter(RateLimits(requests_per_minute=requests, tokens_per_minute=tokens), clock)
    slots = []
    for pause, size in arrivals:
        clock.now += pause
        slots.append(limiter.reserve(size))
        assert slots[-1].start >= clock.now
    starts = [slot.start for slot in slots]
    assert starts == sorted(starts)
    for end in slots:
        # half open: what went out a whole window ago is no longer counted
        inside = [slot for slot in slots if end.start - WINDOW_SECONDS < slot.start <= end.start]
        assert len(inside) <= requests
        assert sum(slot.tokens for slot in inside) <= tokens or len(inside) == 1


def test_no_request_waits_without_need() -> None:
    clock = Clock()
    limiter = RateLimiter(RateLimits(requests_per_minute=2, tokens_per_minute=100), clock)
    assert [limiter.reserve(50).start for _ in range(5)] == [0, 0, 60, 60, 120]
    clock.now = 1000
    assert limiter.reserve(50).start == 1000


def test_settling_makes_room() -> None:
    limiter = RateLimiter(RateLimits(tokens_per_minute=100), Clock())
    first = limiter.reserve(90)
    limiter.settle(first, 5)
    assert limiter.reserve(90).start == 0
    assert limiter.reserve(90).start == 60


def test_requests_are_sent_in_order() -> None:
    limiter = RateLimiter(RateLimits(tokens_per_minute=100), Clock())
    first = limiter.reserve(90)
    assert limiter.reserve(90).start == 60
    # there is room at once now, but another one has been waiting for longer
    limiter.settle(first, 5)
    assert limiter.reserve(1).start == 60


def test_a_request_larger_than_a_minute_gets_a_window_of_its_own() -> None:
    limiter = RateLimiter(RateLimits(tokens_per_minute=100), Clock())
    assert [limiter.reserve(size).start for size in (10, 500, 10)] == [0, 60, 120]


def test_a_hold_delays_later_requests() -> None:
    clock = Clock()
    limiter = RateLimiter(RateLimits(), clock)
    limiter.hold(30)
    limiter.hold(10)
    assert limiter.reserve(1).start == 30
    clock.now = 40
    assert limiter.reserve(1).start == 40


@pytest.mark.parametrize("value", [0, -1, True, 1.5, float("nan"), float("inf"), "5"])
@pytest.mark.parametrize("name", ["requests_per_minute", "tokens_per_minute"])
def test_bad_limits(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"{name} is {value!r}"):
        RateLimits(**{name: value})  # type: ignore[arg-type]


def test_a_clock_that_goes_back_makes_nobody_wait() -> None:
    """A clock set back by an hour continues: no request waits for that hour again."""
    clock = Clock()
    clock.now = 10_000.0
    steady = MonotonicClock(clock)
    limiter = RateLimiter(RateLimits(requests_per_minute=1), steady)
    assert limiter.reserve(1).start == 10_000
    clock.now -= 3600
    assert steady() == 10_000
    assert limiter.reserve(1).start - steady() == 60
    clock.now += 90
    assert steady() == 10_090
    assert limiter.reserve(1).start - steady() == 30
