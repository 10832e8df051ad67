"""Held-out pairs and prompts of a monitor, encoded with the model's tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from koine.align.completion_logits import Continuation
from koine.data.formats import RecordFormat
from koine.data.group_tokens import GROUP_FIELDS, GROUP_FORMATS, encode_group, group_fault, split_answer
from koine.data.records import RecordReader, read_records
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


def read_pairs(
    path: str | Path, *, limit: int | None = None, language: str | None = None, split: str = "all"
) -> list[dict[str, Any]]:
    """Return the preference records of a source, at most `limit` of each language, from the start.

    language: of records that name none. Raises `UserError` for records that are no pairs.
    """
    reader = read_records(
        path,
        language=language,
        split=split,
        carry=GROUP_FIELDS["preferences"],
        record_format=RecordFormat(GROUP_FORMATS["preferences"], "all"),
        accept=partial(group_fault, kind="preferences"),
    )
    return _first(reader, limit)


def read_prompts(
    path: str | Path, *, limit: int | None = None, language: str | None = None, split: str = "all"
) -> list[dict[str, Any]]:
    """Return records with a prompt, at most `limit` of each language, from the start.

    They are chats, pairs, prompts with a completion, or texts, which are the user's message. Their answers are
    not used, but for rewards. language: of records that name none.
    """
    return _first(read_records(path, language=language, split=split), limit)


def _first(reader: RecordReader, limit: int | None) -> list[dict[str, Any]]:
    """Return the first `limit` records of each language; warn of bad ones."""
    records: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for record in reader:
        code = str(record.get("language") or "und")
        counts[code] = counts.get(code, 0) + 1
        if limit is None or counts[code] <= limit:
            records.append(dict(record))
    if reader.bad:
        warnings.warn(
            f"{reader.path}: {reader.bad} bad records were left out, the first: {reader.examples[0]}",
            KoineWarning,
            stacklevel=3,
        )
    return records


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
    """Encode the prompts of records: `prompt`, `messages` up to the last that is not an answer, or `text`.

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
    if record.get("messages"):
        return split_answer(record["messages"])[0]
    return [{"role": "user", "content": record["text"]}] if record.get("text") else []


def _warn_left_out(count: int, what: str) -> None:
    if count:
        warnings.warn(f"{count} {what} fill the model's context and are left out", KoineWarning, stacklevel=3)
