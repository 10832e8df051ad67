"""Encode groups: a prompt and its completions as one tree of segments (`koine.data.groups`).

The prompt is encoded once, up to the assistant's header. A completion is what the whole conversation has
after it: tokens that the template writes around the answer are there, as in generation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from koine.data.groups import GroupKind, Segment
from koine.errors import UserError
from koine.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, Any]]

GROUP_FIELDS: dict[GroupKind, tuple[str, ...]] = {
    "preferences": ("prompt", "chosen", "rejected", "probability", "margin"),
    "labelled": ("messages", "label"),
    "scored": ("prompt", "completions", "scores"),
}
"""Fields of a record of each kind, besides those of every record."""
GROUP_FORMATS: dict[GroupKind, str] = {
    "preferences": "preference",
    "labelled": "unpaired-preference",
    "scored": "scored-completions",
}
"""The format of records of each kind (`koine.data.formats`)."""


@dataclass
class EncodedGroup:
    """Tokens of a group, and what its record says of the completions.

    mask: whether a token counts: the assistant's tokens of completions.
    The other fields are as in `koine.data.groups.Group`.
    """

    tokens: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    probability: float = 1.0
    margin: float = 0.0
    labels: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, parent: int, tokens: Sequence[int], mask: Sequence[bool] | None) -> int:
        """Append a segment, a completion where it has a mask; return its index."""
        self.tokens += tokens
        self.mask += [False] * len(tokens) if mask is None else mask
        self.segments.append(Segment(parent, len(tokens), mask is not None))
        return len(self.segments) - 1


def encode_group(
    record: Mapping[str, Any], kind: GroupKind, tokenizer: Tokenizer, revision: str | None = None
) -> EncodedGroup:
    """Encode a record of a kind.

    Args:
        record: as `read_records` returns it, with the fields of `GROUP_FIELDS`.
        kind: of the group.
        tokenizer: with a chat template.
        revision: of preferences: what the user says after an answer to ask for a better one. Both answers
            then follow each answer once more (SRPO, arXiv 2406.01660).

    Raises:
        UserError: the chat template does not write the prompt as the beginning of the conversation.
    """
    group = EncodedGroup()
    if kind == "preferences":
        prompt, answers = list(record["prompt"]), [record["chosen"], record["rejected"]]
        group.probability = _optional(record, "probability", 1.0)
        group.margin = _optional(record, "margin", 0.0)
    elif kind == "labelled":
        prompt, answer = split_answer(record["messages"])
        answers = [answer]
        group.labels = [bool(record["label"])]
    else:
        prompt, answers = list(record["prompt"]), list(record["completions"])
        group.scores = [float(score) for score in record["scores"]]
    header, _ = tokenizer.encode_messages(prompt, generation_prompt=True)
    root = group.add(-1, header, None)
    encoded = [_after(tokenizer, header, [*prompt, *answer]) for answer in answers]
    placed = [group.add(root, tokens, mask) for tokens, mask in encoded]
    if revision is None:
        return group
    for answer, (tokens, _), segment in zip(answers, encoded, placed, strict=True):
        asked = [*prompt, *answer, {"role": "user", "content": revision}]
        turn = _turn_after(tokenizer, [*header, *tokens], asked)
        parent = group.add(segment, turn, None)
        for (again, mask), other in zip(encoded, answers, strict=True):
            # An answer can be encoded in another way after another text only if the template makes it so.
            found = _after(tokenizer, [*header, *tokens, *turn], [*asked, *other])
            group.add(parent, *(found if found[0] != again else (again, mask)))
    return group


def _optional(record: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number, also one that a CSV file holds as text; an empty cell is none."""
    value = record.get(name)
    return default if value in (None, "") else float(value)


def split_answer(messages: Messages) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Return the messages up to the last that is not the assistant's, and those after it."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return list(messages[:end]), list(messages[end:])


def _after(
    tokenizer: Tokenizer, beginning: Sequence[int], messages: Messages
) -> tuple[list[int], list[bool]]:
    """Return the tokens and the mask of a conversation after its beginning, up to the last that counts."""
    tokens, mask = tokenizer.encode_messages(messages)
    _check_begins(tokens, beginning)
    # What the template writes after the end of the turn is not generated.
    end = len(mask) - next((index for index, counts in enumerate(reversed(mask)) if counts), len(mask))
    if end <= len(beginning):
        raise UserError(
            "a completion without tokens", hint="give the answer as messages of the assistant, not empty"
        )
    return tokens[len(beginning) : end], mask[len(beginning) : end]


def _turn_after(tokenizer: Tokenizer, beginning: Sequence[int], messages: Messages) -> list[int]:
    """Return the tokens of the user's turn that follows, up to the assistant's header."""
    tokens, _ = tokenizer.encode_messages(messages, generation_prompt=True)
    _check_begins(tokens, beginning)
    return tokens[len(beginning) :]


def _check_begins(tokens: Sequence[int], beginning: Sequence[int]) -> None:
    if tokens[: len(beginning)] != list(beginning):
        raise UserError(
            "the chat template does not write the prompt as the beginning of the whole conversation",
            hint="use a chat template that only appends a message, so that a completion follows its prompt",
        )


def group_fault(record: Mapping[str, Any], kind: GroupKind) -> str | None:
    """Return why a record makes no group of a kind, a clause; None where it does."""
    if kind == "preferences":
        return _preference_fault(record)
    if kind == "labelled":
        prompt, answer = split_answer(record["messages"])
        return None if prompt and answer else "the messages do not end with an answer to a prompt"
    return "fewer than two completions" if len(record["completions"]) < 2 else None


def _preference_fault(record: Mapping[str, Any]) -> str | None:
    if list(record["chosen"]) == list(record["rejected"]):
        return "the chosen answer equals the rejected one"
    for name in ("probability", "margin"):
        try:
            value = _optional(record, name, 0.0)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if isinstance(record.get(name), bool) or not math.isfinite(value):
            return f"the {name} is not a finite number"
        if name == "probability" and not 0 <= value <= 1:
            return f"the probability is {value:g}, it must be from 0 to 1"
    return None
