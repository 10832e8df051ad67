"""How long a call waits before it is repeated."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from koine.errors import UserError
from koine.generate.remote.retry import RetryPolicy, is_transient, parse_retry_after

NOON = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("7", 7),
        (" 0.5 ", 0.5),
        ("Sun, 01 Mar 2026 12:01:30 GMT", 90),
        # the same moment told in another zone, and in the old form of C's asctime
        ("Sun, 01 Mar 2026 13:01:30 +0100", 90),
        ("Sun Mar  1 12:01:30 2026", 90),
        ("Sun, 01 Mar 2026 11:00:00 GMT", 0),
        ("-3", None),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("1e999", None),
        ("9" * 5000, None),
        ("Sun, 01 Mar 99999 12:00:00 GMT", None),
        ("Sun, 01 Mar 2026 12:00:00 +99999999999", None),
        ("Sun, 99 Mar 2026 12:00:00 GMT", None),
        ("", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert parse_retry_after(header, now=NOON) == seconds


def test_waits_double_up_to_the_longest_and_end() -> None:
    policy = RetryPolicy(attempts=8, first_wait=1, longest_wait=10)
    waits = [policy.wait(attempt, call="x", retry_after=None) for attempt in range(1, 9)]
    assert waits.pop() is None
    for wait, full in zip(waits, [1, 2, 4, 8, 10, 10, 10], strict=True):
        assert wait is not None
        assert full / 2 <= wait <= full


def test_calls_do_not_retry_all_at_once() -> None:
    policy = RetryPolicy()
    assert len({policy.wait(1, call=str(call), retry_after=None) for call in range(20)}) == 20
    asked = {policy.wait(1, call=str(call), retry_after=30) for call in range(20)}
    assert len(asked) == 20
    assert all(wait is not None and 30 < wait <= 31 for wait in asked)
    assert policy.wait(1, call="x", retry_after=121) is None


def test_a_very_long_series_does_not_overflow() -> None:
    assert RetryPolicy(attempts=10_000).wait(9_999, call="x", retry_after=None) is not None


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 503, 599])
def test_transient(status: int) -> None:
    assert is_transient(status)


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_not_transient(status: int) -> None:
    assert not is_transient(status)


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"first_wait": -1},
        {"first_wait": 5, "longest_wait": 4},
        {"attempts": True},
        {"attempts": 2.5},
        {"first_wait": float("nan")},
    ],
)
def test_bad_policies(options: dict[str, float]) -> None:
    with pytest.raises(UserError):
        RetryPolicy(**options)  # type: ignore[arg-type]
