"""What servers that call themselves OpenAI-compatible answer: it is used, or their own words are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from koine.generate.remote.response_errors import MalformedError
from koine.generate.remote.responses import ParsedResponse, parse_response

USAGE = {"prompt_tokens": 9, "completion_tokens": 4}


def read(document: Any, max_tokens: int = 20) -> ParsedResponse:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_response(content, max_tokens=max_tokens)


def whole(choice: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Nine lamps."}
    return {
        "choices": [{"message": message, "finish_reason": "stop", **(choice or {})}],
        "usage": USAGE,
        **more,
    }


@pytest.mark.parametrize(
    "word",
    [None, "", " ", "stop", "STOP", "eos", "eos_token", "eos_token_id", "end_turn", "stop_sequence", "stop_token", "COMPLETE",
     "finish_reason_stop", "FINISH_REASON_STOP", "endoftext", "<|endoftext|>", "null", "Stop", "normal", "something new", 5, {"type": "stop"}],
)  # fmt: skip
def test_finish_reasons_for_a_complete_text(word: Any) -> None:
    answer = read(whole({"finish_reason": word}))
    assert (answer.text, answer.finish) == ("Nine lamps.", "stop")
    assert answer.unknown_reason == (word == "something new")


@pytest.mark.parametrize(
    "word",
    ["length", "LENGTH", "max_tokens", "MAX_TOKENS", "max_length", "model_length", "FINISH_REASON_MAX_TOKENS", "max_output_tokens",
     "model_context_window_exceeded", "truncated", "incomplete"],
)  # fmt: skip
def test_finish_reasons_for_a_text_that_was_cut_off(word: str) -> None:
    assert read(whole({"finish_reason": word})).finish == "length"


@pytest.mark.parametrize("word", [None, "", "something new"])
def test_without_a_known_finish_reason_the_length_decides(word: str | None) -> None:
    assert read(whole({"finish_reason": word}), max_tokens=4).finish == "length"
    assert read(whole({"finish_reason": "stop"}), max_tokens=4).finish == "stop"


@pytest.mark.parametrize(
    "word",
    ["content_filter", "SAFETY", "RECITATION", "tool_calls", "function_call", "error", "abort", "ERROR_TOXIC", "PROHIBITED_CONTENT",
     "insufficient_system_resource", "refusal", "cancelled"],
)  # fmt: skip
def test_finish_reasons_for_a_text_that_cannot_be_used(word: str) -> None:
    answer = read(whole({"finish_reason": word}))
    assert answer.finish is None
    assert answer.reason == word


def test_a_response_without_any_finish_reason() -> None:
    document = whole()
    del document["choices"][0]["finish_reason"]
    assert read(document).finish == "stop"


PARTS = [{"type": "text", "text": "Nine "}, {"type": "text", "text": "lamps."}]


@pytest.mark.parametrize(
    "message",
    [
        {"content": PARTS},
        {"content": ["Nine ", "lamps."]},
        {"content": [{"type": "thinking", "thinking": "Hm"}, *PARTS, {"type": "image_url", "image_url": {}}]},
        {"content": [{"type": "reasoning", "text": "Hm"}, *PARTS]},
        {"content": [{"type": "output_text", "text": "Nine lamps.", "annotations": []}]},
        {"content": [{"type": "text", "text": {"value": "Nine lamps."}}]},
        {"content": {"type": "text", "text": "Nine lamps."}},
        {"content": "Nine lamps.", "refusal": None, "tool_calls": [], "audio": None, "function_call": None},
        {"content": None, "refusal": "Nine lamps."},
        {"content": "", "refusal": "Nine lamps."},
        {"content": [{"type": "refusal", "refusal": "Nine lamps."}]},
        {"content": "Nine lamps.", "role": "model", "reasoning_content": "Hm", "name": None},
        {"content": "Nine lamps.", "role": None},
        {"text": "Nine lamps."},
        "Nine lamps.",
    ],
    ids=str,
)
def test_messages(message: Any) -> None:
    assert read(whole({"message": message})).text == "Nine lamps."


@pytest.mark.parametrize(
    "document",
    [
        {"choices": [{"index": 0, "text": "Nine lamps.", "finish_reason": "stop"}]},
        {"choices": [{"message": None, "text": "Nine lamps."}]},
        {"choices": [{"delta": {"content": "Nine lamps."}, "finish_reason": "stop"}]},
        {"message": {"role": "assistant", "content": "Nine lamps."}, "done": True, "done_reason": "stop", "eval_count": 4, "prompt_eval_count": 9},
        {"role": "assistant", "type": "message", "content": [{"type": "text", "text": "Nine lamps."}], "stop_reason": "end_turn"},
        [whole()],
        whole(error=None),
        whole(error=""),
        whole(error={}),
        whole(extra={"a": [1]}, system_fingerprint=None, service_tier="x", success=True),
        whole({"error": None}),
        whole() | {"usage": None},
        whole() | {"usage": []},
        {"choices": [*whole()["choices"], {"index": 1, "message": {"content": "other"}}]},
    ],
    ids=str,
)  # fmt: skip
def test_documents(document: Any) -> None:
    answer = read(document)
    assert (answer.text, answer.finish) == ("Nine lamps.", "stop")


def test_a_number_of_any_length_beside_the_text() -> None:
    content = json.dumps(whole()).replace('"choices"', f'"created": 1{"0" * 6000}, "choices"').encode()
    assert read(content).text == "Nine lamps."


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("word", ["length", None])
def test_a_response_with_reasoning_only(content: str | None, word: str | None) -> None:
    message = {"content": content, "reasoning_content": "Let me count"}
    answer = read(whole({"message": message, "finish_reason": word}))
    assert (answer.text, answer.finish) == ("", "length")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, ()),
        ({"content": None}, ()),
        ({"content": []}, ()),
        ({"content": [{"token": "N", "logprob": -0.5, "top_logprobs": None}]}, (-0.5,)),
        ({"content": [{"token": "N", "logprob": 0, "bytes": None}]}, (0.0,)),
        ({"tokens": ["N"], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}, (-0.5,)),
        ([-0.5], (-0.5,)),
        ({"refusal": None}, ()),
    ],
)
def test_log_probabilities(given: Any, kept: tuple[float, ...]) -> None:
    answer = read(whole({"logprobs": given}))
    assert answer.log_probabilities == kept
    assert not answer.lost_log_probabilities


@pytest.mark.parametrize("number", [None, float("-inf"), float("nan"), "x", True, 10**400, [], {}])
@pytest.mark.parametrize("old", [True, False])
def test_one_invalid_log_probability_drops_all(number: Any, old: bool) -> None:
    content = {"content": [{"token": "N", "logprob": -1.0}, {"token": "i", "logprob": number}]}
    answer = read(whole({"logprobs": {"token_logprobs": [-1.0, number]} if old else content}))
    assert (answer.text, answer.log_probabilities, answer.lost_log_probabilities) == ("Nine lamps.", (), True)


def events(*chunks: Any, end: str = "data: [DONE]\n\n", between: str = "\n\n") -> bytes:
    return ("".join(f"data: {json.dumps(chunk)}{between}" for chunk in chunks) + end).encode()


def delta(**choice: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": None, **choice}]}


STREAM = [
    delta(delta={"role": "assistant"}),
    delta(delta={"content": "Nine "}, logprobs={"content": [{"logprob": -1.0}]}),
    delta(delta={"content": "lamps."}, logprobs={"content": [{"logprob": -2.0}]}),
    delta(delta={}, finish_reason="length"),
    {"choices": [], "usage": USAGE},
]


@pytest.mark.parametrize(
    "content",
    [
        events(*STREAM),
        events(*STREAM, end=""),
        events(*STREAM, between="\r\n\r\n"),
        b": OPENROUTER PROCESSING\n\nevent: message\nid: 1\n" + events(*STREAM),
        "\ufeff".encode() + events(*STREAM),
        "\n".join(json.dumps(chunk) for chunk in STREAM).encode(),
    ],
)
def test_an_unrequested_stream_is_joined(content: bytes) -> None:
    answer = read(content)
    assert (answer.text, answer.finish, answer.usage) == ("Nine lamps.", "length", (9, 4))
    assert answer.log_probabilities == (-1.0, -2.0)


def test_an_incomplete_stream_is_malformed() -> None:
    with pytest.raises(MalformedError, match="a stream that breaks off"):
        read(events(*STREAM[:3], end=""))
    with pytest.raises(MalformedError, match="it is an error") as raised:
        read(events(*STREAM[:2], {"error": {"message": "overloaded", "code": 502}}))
    assert (raised.value.message, raised.value.transient) == ("overloaded", True)
    assert read(b"data: " + json.dumps(whole()).encode() + b"\n\n").text == "Nine lamps."


@pytest.mark.parametrize(
    ("document", "said", "passing"),
    [
        ({"error": {"message": "model overloaded", "code": 503}}, "model overloaded", True),
        ({"error": {"message": "no such model", "code": "404"}}, "no such model", False),
        ({"error": {"message": "bad", "type": "invalid_request_error", "code": None}}, "bad", None),
        ({"error": "model overloaded"}, "model overloaded", None),
        ({"error": ["a", "b"]}, '["a", "b"]', None),
        ({"error": {"code": 503}}, '{"code": 503}', True),
        ({"error": 5}, "5", None),
        ({"error": {"message": "bad"}, "choices": []}, "bad", None),
        ({"error": {"message": "bad"}, "choices": None}, "bad", None),
        ({"choices": [{"error": {"message": "upstream", "code": 502}, "finish_reason": "error", "message": {"content": "Ni"}}]}, "upstream", True),
        ({"object": "error", "message": "bad", "code": 40001}, "bad", None),
        ({"success": False, "errors": [{"message": "bad"}], "result": None}, "bad", None),
        ({"code": 1001, "msg": "out of money", "data": None}, "out of money", None),
        ({"base_resp": {"status_code": 1004, "status_msg": "login fail"}, "choices": None}, "login fail", None),
        ([{"error": {"message": "bad", "code": 400}}], "bad", False),
        ({"detail": "Not Found"}, "Not Found", None),
        ({}, "{}", None),
        (b"<html>busy</html>", "<html>busy</html>", None),
        (b"upstream connect error", "upstream connect error", None),
    ],
)  # fmt: skip
def test_the_servers_error_message_is_found(document: Any, said: str, passing: bool | None) -> None:
    with pytest.raises(MalformedError) as raised:
        read(document)
    assert (raised.value.message, raised.value.transient) == (said, passing)


def test_the_same_fault_has_the_same_kind() -> None:
    """Whatever differs from answer to answer stands in the server's words, not in the kind."""
    kinds = set()
    for content in (b"<html>1</html>", b"   <p>two"):
        with pytest.raises(MalformedError) as raised:
            read(content)
        kinds.add(raised.value.kind)
    assert len(kinds) == 1


@pytest.mark.parametrize("depth", [100, 900, 990, 100_000])
@pytest.mark.parametrize(
    "place", ["{}", '{{"choices": [{{"message": {{"content": {}}}}}]}}', '{{"error": {}}}']
)
def test_deep_nesting_is_malformed(depth: int, place: str) -> None:
    with pytest.raises(MalformedError):
        read(place.format("[" * depth + "5" + "]" * depth).encode())
