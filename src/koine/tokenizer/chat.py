"""Render conversations as text: our turn format, and its Jinja template.

    <BOS_TOKEN> ( <|START_OF_TURN_TOKEN|> <|ROLE_TOKEN|> text <|END_OF_TURN_TOKEN|> )*

without the spaces. Message text that looks like a special token stays text: contents and markers are encoded
separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from koine.errors import UserError, did_you_mean
from koine.tokenizer.special import CHATBOT, END_OF_TURN, START_OF_TURN, SYSTEM, USER

Message = Mapping[str, Any]
ROLE_TOKENS: Final[dict[str, str]] = {"system": SYSTEM, "user": USER, "assistant": CHATBOT}

# The same format in Jinja; `generation` marks the completion, for training.
CHAT_TEMPLATE: Final = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'assistant' %}"
    f"{{{{- '{START_OF_TURN}{CHATBOT}' }}}}"
    "{%- generation %}"
    f"{{{{- message['content'] + '{END_OF_TURN}' }}}}"
    "{%- endgeneration %}"
    "{%- elif message['role'] == 'user' %}"
    f"{{{{- '{START_OF_TURN}{USER}' + message['content'] + '{END_OF_TURN}' }}}}"
    "{%- elif message['role'] == 'system' %}"
    f"{{{{- '{START_OF_TURN}{SYSTEM}' + message['content'] + '{END_OF_TURN}' }}}}"
    "{%- else %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    f"{{{{- '{START_OF_TURN}{CHATBOT}' }}}}"
    "{%- endif %}"
)


def check_messages(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return (role, content) of each message. Raises `UserError` for anything but a conversation."""
    if isinstance(messages, str | bytes | Mapping):
        raise UserError(
            "messages are a list of {role, content}", hint='write [{"role": "user", "content": "..."}]'
        )
    turns = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(
                f"message {number} has no role and content", hint='write {"role": ..., "content": ...}'
            )
        role, content = message["role"], message["content"]
        if role not in ROLE_TOKENS:
            raise UserError(
                f"message {number} has the unknown role '{role}'", hint=did_you_mean(str(role), ROLE_TOKENS)
            )
        if not isinstance(content, str):
            raise UserError(f"the content of message {number} is not text", hint="give a string")
        turns.append((role, content))
    if not turns:
        raise UserError("a conversation without messages", hint="give at least one message")
    return turns


def render_messages(messages: Sequence[Message], *, bos: str, generation_prompt: bool = False) -> str:
    """Render a conversation as one string, equal to the output of `CHAT_TEMPLATE`."""
    parts = [bos]
    for role, content in check_messages(messages):
        parts += [START_OF_TURN, ROLE_TOKENS[role], content, END_OF_TURN]
    if generation_prompt:
        parts += [START_OF_TURN, CHATBOT]
    return "".join(parts)
