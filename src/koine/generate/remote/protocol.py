"""Build the request of `POST /chat/completions`, and bound its tokens and the size of its response."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

from koine.errors import UserError
from koine.generate.messages import Message
from koine.generate.sampling import Sampling

LengthField = Literal["max_tokens", "max_completion_tokens"]

# Sent only where they differ from these neutral values. The first is OpenAI's; servers of open models (vLLM,
# SGLang, llama.cpp) know the others, and other servers refuse them.
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
SUPPORTED = {"temperature", "seed", "max_new_tokens", "stop", "json_schema", *NEUTRAL}

# Bounds of the tokens that the unknown chat template adds to a message and to the conversation.
TOKENS_AROUND_MESSAGE = 16
TOKENS_AROUND_CONVERSATION = 64

# Bounds of a response's JSON: everything but the text, and one token with its log-probability and reasoning.
BYTES_AROUND_RESPONSE = 4 << 20
BYTES_PER_TOKEN = 2 << 10
MAX_BYTES = 256 << 20


def request_body(
    model: str,
    messages: Sequence[Message],
    sampling: Sampling,
    *,
    seed: int | None,
    length_field: LengthField,
    log_probabilities: bool,
) -> dict[str, Any]:
    """Return the request as a JSON object, without neutral settings.

    Raises `UserError` for a setting of `sampling` that no endpoint knows and that is not at its default.
    """
    for entry in dataclasses.fields(sampling):
        if entry.name not in SUPPORTED and getattr(sampling, entry.name) != entry.default:
            raise UserError(
                f"the setting {entry.name.replace('_', '-')} cannot be sent to an endpoint",
                hint="leave it out",
            )
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


def max_prompt_tokens(body: dict[str, Any]) -> int:
    """Return an upper bound of the prompt's tokens, for any tokenizer that falls back to bytes.

    One for each byte of the messages (and of the schema, which some endpoints write into the prompt), and a
    margin for the chat template.
    """
    texts = [str(value) for message in body["messages"] for value in message.values()]
    if "response_format" in body:
        texts.append(json.dumps(body["response_format"], ensure_ascii=False))
    around = TOKENS_AROUND_CONVERSATION + TOKENS_AROUND_MESSAGE * len(body["messages"])
    return sum(len(text.encode("utf-8")) for text in texts) + around


def max_response_bytes(completion_tokens: int) -> int:
    """Return an upper bound of a response's bytes. A longer body is not read to its end."""
    return min(MAX_BYTES, BYTES_AROUND_RESPONSE + BYTES_PER_TOKEN * completion_tokens)
