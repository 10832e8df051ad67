"""The messages of `POST /chat/completions`: what is asked, and how an answer is read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from koine.errors import UserError
from koine.serve.conversation import Message
from koine.serve.sampling import Sampling

LengthField = Literal["max_tokens", "max_completion_tokens"]

# Sent only where they differ from "changes nothing": the first is OpenAI's, the others are understood by the servers
# of open models (vLLM, SGLang, llama.cpp) and refused by name elsewhere.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
UNDERSTOOD = {"temperature", "seed", "max_new_tokens", "stop", "json_schema", *NEUTRAL}

# The tokens that a chat template puts around a message and around the whole conversation are not known here.
TOKENS_AROUND_MESSAGE = 16
TOKENS_AROUND_CONVERSATION = 64

# What a server's error message is cut to.
MESSAGE_CHARACTERS = 300


class MalformedError(Exception):
    """An answer that is none: no JSON, no choices, fields of another kind."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer as the endpoint gave it.

    log_probabilities: natural, of each token; empty where the endpoint gives none.
    finish: the endpoint's word for why it ended.
    usage: prompt tokens and completion tokens, or None where the endpoint does not say.
    """

    text: str
    log_probabilities: tuple[float, ...]
    finish: str
    usage: tuple[int, int] | None


def request_body(
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    seed: int | None,
    length_field: LengthField,
    log_probabilities: bool,
) -> dict[str, Any]:
    """The request as a JSON object; settings that change nothing are left out.

    Raises `UserError` for a setting of `sampling` that has no counterpart here and is not at its default.
    """
    for entry in dataclasses.fields(sampling):
        if entry.name not in UNDERSTOOD and getattr(sampling, entry.name) != entry.default:
            raise UserError(
                f"the setting {entry.name.replace('_', '-')} cannot be sent to an endpoint", mend="leave it out"
            )  # fmt: skip
    body: dict[str, Any] = {
        "model": model,
        "messages": [dict(message) for message in messages],
        length_field: sampling.max_new_tokens,
        "temperature": sampling.temperature,
    }
    for name, neutral in NEUTRAL.items():
        if getattr(sampling, name) != neutral:
            body[name] = getattr(sampling, name)
    if seed is not None:
        body["seed"] = seed
    if stop := getattr(sampling, "stop", ()):
        body["stop"] = list(stop)
    if (schema := getattr(sampling, "json_schema", None)) is not None:
        named = {"name": "answer", "schema": schema, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    if log_probabilities:
        body["logprobs"] = True
    return body


def most_prompt_tokens(body: dict[str, Any]) -> int:
    """No tokenizer that falls back to bytes makes more tokens of a request than this.

    One for each byte of the messages (and of the schema, which some endpoints write into the prompt), and a margin for
    the template.
    """
    texts = [str(value) for message in body["messages"] for value in message.values()]
    if "response_format" in body:
        texts.append(json.dumps(body["response_format"], ensure_ascii=False))
    around = TOKENS_AROUND_CONVERSATION + TOKENS_AROUND_MESSAGE * len(body["messages"])
    return sum(len(text.encode("utf-8")) for text in texts) + around


def read_usage(content: bytes) -> tuple[int, int] | None:
    """Prompt and completion tokens that an answer reports, or None; also of an answer that is otherwise malformed."""
    try:
        usage = _object(content).get("usage")
    except MalformedError:
        return None
    if not isinstance(usage, dict):
        return None
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    prompt, completion = (
        count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None
        for count in counts
    )
    return None if prompt is None or completion is None else (prompt, completion)


def read_answer(content: bytes) -> Answer:
    """Read the body of a successful response. Raises `MalformedError`."""
    choices = _object(content).get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise MalformedError("it has no choices")
    choice = choices[0]
    message = choice.get("message")
    if not isinstance(message, dict):
        raise MalformedError("its choice has no message")
    # Null where the model only thought until it was cut off; `refusal` is OpenAI's field for "I will not".
    text = message.get("content")
    if text is None:
        text = message.get("refusal") or ""
    if not isinstance(text, str):
        raise MalformedError("its content is no text")
    finish = choice.get("finish_reason")
    if not isinstance(finish, str):
        raise MalformedError("it has no finish reason")
    return Answer(
        # A lone surrogate is no Unicode and could not be written to a file.
        text=text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        log_probabilities=_log_probabilities(choice.get("logprobs")),
        finish=finish,
        usage=read_usage(content),
    )


def error_message(content: bytes) -> str:
    """The server's own words in an error response, cut to a line; empty where there are none."""
    text = content.decode("utf-8", "replace")
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and name in value:
            value = value[name]
    line = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return line if len(line) <= MESSAGE_CHARACTERS else line[:MESSAGE_CHARACTERS] + "..."


def _log_probabilities(value: Any) -> tuple[float, ...]:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, list):
        return ()
    numbers = [entry.get("logprob") if isinstance(entry, dict) else None for entry in content]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise MalformedError("its log-probabilities are no numbers")
    return tuple(float(number) for number in numbers if number is not None)


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedError("it is no JSON object")
    return value
