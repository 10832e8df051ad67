"""The messages of an endpoint: settings that a later `Sampling` may bring, and errors in every dialect."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from koine.errors import UserError
from koine.generate.remote.protocol import max_prompt_tokens, request_body
from koine.generate.remote.redaction import Redactor
from koine.generate.remote.responses import error_text, parse_usage
from koine.generate.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class More(Sampling):
    stop: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = None
    novel: int = 0


def body(sampling: Sampling, content: str = "q") -> dict[str, Any]:
    return request_body(
        "m",
        [{"role": "user", "content": content}],
        sampling,
        seed=None,
        length_field="max_tokens",
        log_probabilities=False,
    )


def test_stops_and_schema() -> None:
    schema = {"type": "object"}
    sent = body(More(stop=("a", "b"), json_schema=schema))
    assert sent["stop"] == ["a", "b"]
    assert sent["response_format"]["json_schema"]["schema"] == schema
    assert {"stop", "response_format"}.isdisjoint(body(More()))


def test_a_setting_that_cannot_be_sent_is_refused_not_dropped() -> None:
    body(More(novel=0))
    with pytest.raises(UserError, match="novel cannot be sent"):
        body(More(novel=1))


@pytest.mark.parametrize("text", ["", "a" * 100, "東京" * 50, "🇨🇭\n" * 20])
def test_no_tokenizer_makes_more_tokens_than_the_worst_case(text: str) -> None:
    assert max_prompt_tokens(body(Sampling(), text)) >= len(text.encode()) + 16
    plain, constrained = body(More(), text), body(More(json_schema={"const": "x" * 100}), text)
    assert max_prompt_tokens(constrained) >= max_prompt_tokens(plain) + 100


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"error": {"message": "no", "type": "x"}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"message": "no"}', "no"),
        (b'{"detail": "no"}', "no"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b"no\r\n  no", "no no"),
        (b"", ""),
        (b"\xff", "\ufffd"),
        (b"x" * 1000, "x" * 300 + "..."),
    ],
)
def test_error_messages(content: bytes, line: str) -> None:
    assert Redactor().line(error_text(content)) == line


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 0}, (3, 0)),
        ({"prompt_tokens": 3}, None),
        ({"prompt_tokens": 3.0, "completion_tokens": 1.0}, (3, 1)),
        ({"input_tokens": 3, "output_tokens": 1}, (3, 1)),
        ({"prompt_tokens": 3.5, "completion_tokens": 1}, None),
        ({"prompt_tokens": 10**30, "completion_tokens": 1}, None),
        ({"prompt_tokens": float("nan"), "completion_tokens": 1}, None),
        ({"prompt_tokens": "3", "completion_tokens": 1}, None),
        ({"prompt_tokens": -3, "completion_tokens": 1}, None),
        ({"prompt_tokens": True, "completion_tokens": 1}, None),
        ([], None),
    ],
)
def test_usage(usage: Any, expected: tuple[int, int] | None) -> None:
    assert parse_usage(json.dumps({"usage": usage}).encode()) == expected
