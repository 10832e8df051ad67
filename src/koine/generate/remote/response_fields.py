"""Read the fields of a response in the dialects of servers that call themselves OpenAI-compatible."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from koine.generate.remote.response_errors import MalformedError, dump_json, is_error, malformed, read_error

MAX_TOKENS = 10**12
"""Larger token counts are ignored."""


def find_choice(document: dict[str, Any]) -> dict[str, Any]:
    """Return the first choice of a response. Raises `MalformedError` where there is none."""
    choice = first_item(document.get("choices"))
    if isinstance(choice, dict):
        return choice
    if choice is None:
        # Without choices: Ollama's own form has one message, Anthropic's the parts of one.
        if isinstance(document.get("message"), dict | str) and not is_error(document):
            return document
        if isinstance(document.get("content"), list) and document.get("role") == "assistant":
            return {"message": document, "finish_reason": document.get("stop_reason")}
    problem = read_error(document)
    raise problem if problem is not None else malformed("it has no choices", document)


def first_item(value: Any) -> Any:
    """Return the first item of a list, or None for anything else."""
    return value[0] if isinstance(value, list) and value else None


def read_text(choice: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the text of a choice, and whether it has reasoning.

    Raises `MalformedError` for content that is no text.
    """
    message = next(
        (choice[name] for name in ("message", "delta") if isinstance(choice.get(name), dict | str)), None
    )
    if isinstance(message, str):
        return message, False
    if message is None:
        text = choice.get("text")
        return (text if isinstance(text, str) else ""), False
    reasoned = any(message.get(name) for name in ("reasoning_content", "reasoning", "thinking", "thought"))
    text = _join_content(message.get("content"))
    if not text:
        # `refusal` is OpenAI's field for a refusal; some completion servers fill only `text`.
        for value in (message.get("refusal"), message.get("text"), choice.get("text")):
            if isinstance(value, str) and value:
                return value, reasoned
    return text, reasoned


def has_content(choice: Mapping[str, Any]) -> bool:
    """Return whether a choice has text, which may be empty."""
    message = choice.get("message")
    if isinstance(message, dict):
        return "content" in message or "text" in message or "refusal" in message
    return isinstance(message, str) or isinstance(choice.get("text"), str)


def read_reason(choice: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Return the server's finish reason, or an empty string."""
    for value in (choice.get("finish_reason"), choice.get("finishReason"), document.get("done_reason")):
        if isinstance(value, dict):
            value = value.get("type") or value.get("reason")
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def read_usage(document: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the prompt tokens and completion tokens that a response reports, or None."""
    usage = document.get("usage")
    if not isinstance(usage, dict):
        usage = document if "eval_count" in document else {}
    counts = []
    for names in (
        ("prompt_tokens", "input_tokens", "prompt_eval_count"),
        ("completion_tokens", "output_tokens", "eval_count"),
    ):
        value = next((usage[name] for name in names if usage.get(name) is not None), None)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_TOKENS:
            return None
        counts.append(value)
    return counts[0], counts[1]


def read_log_probabilities(value: Any) -> tuple[float, ...] | None:
    """Return one log-probability a token: empty where none are given, None where some are not finite numbers.

    If one is null or minus infinity, all are dropped: the others could not be matched to their tokens.
    """
    if isinstance(value, dict):
        # `token_logprobs` is the layout of the older completions.
        found = value.get("content") if value.get("content") is not None else value.get("token_logprobs")
    else:
        found = value
    if found is None:
        return ()
    if not isinstance(found, list):
        return None
    numbers = []
    for entry in found:
        number = entry.get("logprob") if isinstance(entry, dict) else entry
        if isinstance(number, bool) or not isinstance(number, int | float):
            return None
        try:
            number = float(number)
        except OverflowError:
            return None
        if not math.isfinite(number):
            return None
        numbers.append(number)
    return tuple(numbers)


def _join_content(content: Any) -> str:
    """Return a message's content as one text.

    Servers send a string, a list of parts, or null where the model only reasoned.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part_text(part) for part in content)
    if isinstance(content, dict):
        return _part_text(content)
    raise MalformedError("its content is no text", message=dump_json(content))


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        if str(part.get("type", "text")) in ("reasoning", "thinking", "thought", "redacted_thinking"):
            return ""
        for name in ("text", "refusal", "content"):
            value = part.get(name)
            if isinstance(value, dict):
                value = value.get("value")
            if isinstance(value, str):
                return value
        if "type" in part:
            return ""  # an image, a tool call
    raise MalformedError("its content is no text", message=dump_json(part))
