"""Read labels and messages of records, and find what is wrong with a record's content."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from uuid import UUID

from koine.fields import short_repr

ROLES = ("system", "user", "assistant")
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
"""Role of each name of a speaker, in lower case: ShareGPT's, OpenAI's, Gemma's and OpenAssistant's."""
_TOOLS = (
    "tool",
    "function",
    "function_call",
    "function_response",
    "tool_call",
    "tool_response",
    "observation",
    "ipython",
)
_TEXT_PARTS = ("text", "input_text", "output_text")


def read_label(value: Any, *, number: bool) -> str | None:
    """Return the text of a label, empty if there is none, or None if it is no label.

    NaN counts as none: pandas writes missing values so. number: numbers are labels too.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if number and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, UUID):
        return str(value)
    return value if isinstance(value, str) and surrogate_position(value) is None else None


def surrogate_position(text: str) -> int | None:
    """Return the position of a lone surrogate in a text, which UTF-8 cannot hold."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return error.start
    return None


def is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty: None, or the NaN that pandas writes."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def first_field(row: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of several fields that a row has."""
    return next((name for name in names if not _is_missing(row.get(name))), None)


def filled(value: Any) -> bool:
    """Return whether an optional cell holds something."""
    return not _is_missing(value) and not is_blank(value)


def read_messages(messages: Any) -> Any:
    """Return messages with `role` and `content`; what is no list is returned as it is."""
    return [read_message(message) for message in messages] if isinstance(messages, list) else messages


def system_message(row: Mapping[str, Any], names: Sequence[str], messages: Any) -> Any:
    """Return messages that begin with the system prompt of a row, if it has one and they have none."""
    name = first_field(row, names)
    if name is None or not isinstance(messages, list) or not filled(row[name]):
        return messages
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        return messages
    return [{"role": "system", "content": row[name]}, *messages]


def read_message(message: Any) -> Any:
    """Return a message with `role` and `content`.

    Also from ShareGPT's `from` and `value`, from other names of the roles, and from content in parts of text.
    """
    if not isinstance(message, dict):
        return message
    if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
        rest = {key: entry for key, entry in message.items() if key not in ("from", "value")}
        message = {"role": message["from"], "content": message["value"], **rest}
    role, parts = message.get("role"), message.get("content")
    if isinstance(role, str):
        message = {**message, "role": SPEAKERS.get(role.lower(), role)}
    if isinstance(parts, list) and parts:
        texts = [part.get("text") for part in parts if _is_text_part(part)]
        whole = [text for text in texts if isinstance(text, str)]
        if len(whole) == len(parts):
            message = {**message, "content": "".join(whole)}
    # Other fields of a message are kept if they can be written as JSON.
    kept = ("role", "content", "tool_calls", "function_call")
    return {key: entry for key, entry in message.items() if key in kept or _is_plain(entry)}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _TEXT_PARTS


def _is_plain(value: Any) -> bool:
    """Return whether JSON in UTF-8 can hold a value."""
    if isinstance(value, str):
        return surrogate_position(value) is None
    return value is None or isinstance(value, bool | int | float)


def content_fault(record: Mapping[str, Any], *, questions: bool) -> str | None:
    """Return the reason why a record's text or messages are bad, or None."""
    text, messages = record.get("text"), record.get("messages")
    if messages is None:
        if text is None:
            return f"neither 'text' nor 'messages' (it has {', '.join(map(str, list(record)[:8]))})"
        return text_fault(text)
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list with at least one message"
    previous = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"message {number} is not an object with 'role' and 'content'"
        role = message["role"]
        if role in _TOOLS or message.get("tool_calls") or message.get("function_call"):
            return f"message {number} is a tool's or calls one; records hold the roles {', '.join(ROLES)}"
        if role not in ROLES:
            return f"message {number} has the role {short_repr(role)}; known: {', '.join(ROLES)}"
        if role == "system" and number > 1:
            return f"message {number} is a system message; only the first may be"
        if role == previous:
            return f"messages {number - 1} and {number} are both of the {role}"
        wrong = _part_fault(message["content"]) or text_fault(message["content"])
        if wrong is not None:
            return f"message {number}: {wrong}"
        previous = role
    if previous == "assistant" or (questions and _is_question(record)):
        return None
    return "the last message is not the assistant's"


def _part_fault(content: Any) -> str | None:
    """Return the reason why content in parts is bad: a part that is not text."""
    if not isinstance(content, list):
        return None
    others = [
        part.get("type") if isinstance(part, dict) else part for part in content if not _is_text_part(part)
    ]
    return f"a part is of the type {short_repr(others[0])}; only text is read" if others else None


def _is_question(record: Mapping[str, Any]) -> bool:
    """Return whether a record is a question with its answer beside the messages.

    The messages of a question end with the user's turn.
    """
    answer = record.get("answer")
    return record["messages"][-1]["role"] == "user" and isinstance(answer, str) and bool(answer.strip())


def text_fault(text: Any) -> str | None:
    """Return the reason why a text is bad, or None."""
    if not isinstance(text, str):
        return f"the text is {type(text).__name__}, not a string"
    if not text.strip():
        return "the text is empty"
    if "\0" in text:
        return "the text holds NUL characters"
    half = surrogate_position(text)
    return None if half is None else f"the text holds a lone surrogate at character {half}"
