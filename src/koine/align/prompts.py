"""Prompts to draw completions for: records, encoded up to the assistant's header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.data.piped import local_copy, shown_name
from koine.data.readers import read_rows
from koine.errors import UserError
from koine.fields import short_repr
from koine.generate.messages import Message
from koine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A conversation to answer.

    record: the row that it comes from, which rewards read.
    messages: up to the one to answer.
    tokens: ids, up to the assistant's header.
    """

    record: Mapping[str, Any]
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]

    @property
    def id(self) -> str:
        """Id of its record."""
        return str(self.record["id"])

    @property
    def language(self) -> str:
        """Language of its record, "und" where that has none."""
        return str(self.record.get("language") or "und")


def encode_prompts(records: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[Prompt]:
    """Encode records with `prompt`: text, or messages. A record without an id gets its number as id."""
    found = []
    for number, record in enumerate(records):
        named = {"id": number, **record}
        messages = read_messages(record.get("prompt"), f"prompt '{named['id']}'")
        tokens, _ = tokenizer.encode_messages(messages, generation_prompt=True)
        found.append(Prompt(named, tuple(messages), tuple(tokens)))
    return found


def read_prompts(path: Path, tokenizer: Tokenizer) -> list[Prompt]:
    """Read the rows of a file, each with `prompt` (text or messages) and what the reward reads.

    Raises `UserError` for a row of another form, two rows with one id, and a file without rows.
    """
    file = local_copy(path)
    records: list[Mapping[str, Any]] = []
    ids: dict[str, str] = {}
    for place, row in read_rows(file):
        where = f"{shown_name(file)}, {place}"
        if isinstance(row, str):
            raise UserError(row, where=where)
        read_messages(row.get("prompt"), where)
        name = str(row.get("id", len(records)))
        if name in ids:
            raise UserError(
                f"the id {short_repr(name)} stands at {ids[name]} too",
                where=where,
                hint="give each prompt its own",
            )
        ids[name] = place
        records.append({**row, "id": name})
    if not records:
        raise UserError("holds no prompts", where=path)
    return encode_prompts(records, tokenizer)


def read_messages(prompt: Any, where: str) -> list[Message]:
    """Return a prompt's messages; raise `UserError` where it has none, or ends with an answer."""
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt}]
    hint = "give text, or messages that end with the one to answer"
    if not isinstance(prompt, list) or not prompt:
        raise UserError(f"the prompt is {short_repr(prompt)}", where=where, hint=hint)
    messages: list[Message] = []
    for message in prompt:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(name), str) for name in ("role", "content")
        ):
            raise UserError(f"a message of the prompt is {short_repr(message)}", where=where, hint=hint)
        messages.append({"role": message["role"], "content": message["content"]})
    if messages[-1]["role"] == "assistant":
        raise UserError("the prompt ends with an answer", where=where, hint=hint)
    return messages


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return a sha256 over records and tokens."""
    digest = hashlib.sha256()
    for prompt in prompts:
        line = {"record": dict(prompt.record), "tokens": prompt.tokens}
        digest.update(json.dumps(line, sort_keys=True, default=str).encode())
    return digest.hexdigest()
