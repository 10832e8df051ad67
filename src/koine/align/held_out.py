"""Held-out pairs and prompts of a monitor, encoded with the model's tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from koine.align.completion_logits import Continuation
from koine.data.group_tokens import encode_group, split_answer
from koine.errors import KoineWarning, UserError
from koine.tokenizer import Tokenizer

Record = Mapping[str, Any]


@dataclass(frozen=True)
class HeldOutPair:
    """Token ids of a prompt with a chosen and a rejected completion."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    language: str

    @property
    def continuations(self) -> tuple[Continuation, Continuation]:
        """The chosen and the rejected completion after the prompt."""
        return Continuation(self.prompt, self.chosen), Continuation(self.prompt, self.rejected)


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt to answer: its messages, its token ids up to the assistant's header, and its record."""

    id: str
    language: str
    messages: tuple[Mapping[str, Any], ...]
    tokens: tuple[int, ...]
    record: Record = field(compare=False)


def encode_pairs(
    records: Iterable[Record], tokenizer: Tokenizer, *, context: int | None = None
) -> list[HeldOutPair]:
    """Encode preference records: `prompt`, `chosen` and `rejected` are lists of messages.

    Completions are cut where the model's context ends. Pairs whose prompt fills it are left out, with a warning.

    Raises:
        UserError: no pair is left, or the chat template does not write the prompt as the beginning.
    """
    pairs, left_out = [], 0
    for record in records:
        group = encode_group(record, "preferences", tokenizer)
        lengths = [segment.length for segment in group.segments]
        prompt, rest = group.tokens[: lengths[0]], group.tokens[lengths[0] :]
        room = None if context is None else context - len(prompt)
        if room is not None and room < 1:
            left_out += 1
            continue
        chosen, rejected = rest[: lengths[1]][:room], rest[lengths[1] :][:room]
        language = str(record.get("language") or "und")
        pairs.append(HeldOutPair(tuple(prompt), tuple(chosen), tuple(rejected), language))
    _warn_left_out(left_out, "held-out pairs")
    if not pairs:
        raise UserError("there is no held-out pair", hint="give records with prompt, chosen and rejected")
    return pairs


def encode_prompts(
    records: Iterable[Record], tokenizer: Tokenizer, *, context: int | None = None
) -> list[HeldOutPrompt]:
    """Encode the prompts of records: their `prompt`, or `messages` up to the last that is not an answer.

    Prompts that fill the context are left out, with a warning.

    Raises:
        UserError: no prompt is left.
    """
    prompts, left_out = [], 0
    for number, record in enumerate(records):
        messages = _messages(record)
        if not messages:
            continue
        tokens, _ = tokenizer.encode_messages(messages, generation_prompt=True)
        if context is not None and len(tokens) >= context:
            left_out += 1
            continue
        name, language = str(record.get("id") or number), str(record.get("language") or "und")
        prompts.append(HeldOutPrompt(name, language, tuple(messages), tuple(tokens), record))
    _warn_left_out(left_out, "prompts")
    if not prompts:
        raise UserError("there is no prompt to answer", hint="give records with a prompt or messages")
    return prompts


def _messages(record: Record) -> Sequence[Mapping[str, Any]]:
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt:
        return list(prompt)
    return split_answer(record["messages"])[0] if record.get("messages") else []


def _warn_left_out(count: int, what: str) -> None:
    if count:
        warnings.warn(f"{count} {what} fill the model's context and are left out", KoineWarning, stacklevel=3)
