"""Read preference records: a prompt with a preferred and a rejected answer.

Answers are texts, lists of messages, or two complete conversations with a common beginning (as in hh-rlhf and
UltraFeedback). Whatever the source, `prompt`, `chosen` and `rejected` are lists of messages in the record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from koine.data.record_content import (
    SPEAKERS,
    content_fault,
    filled,
    first_field,
    read_messages,
    system_message,
    text_fault,
)

Take = Literal["chosen", "rejected", "all"]
"""Answers of preference records that become chats; all: every answer, for groups."""
Messages = list[dict[str, Any]]

CHATS = ("conversations", "conversation")
SYSTEM = ("system", "system_prompt")
INPUTS = ("input", "context")
"""Names of the same field in data of different makers."""
_PROMPTS = ("prompt", "question", "query", "instruction", *CHATS)
_SCORES = {
    "score_chosen": ("score_chosen", "chosen_score"),
    "score_rejected": ("score_rejected", "rejected_score"),
}
PREFERENCE_FIELDS = (*_PROMPTS, *INPUTS, *SYSTEM, *(name for names in _SCORES.values() for name in names))
"""Fields that preference records may have besides the answers."""
_SPEAKERS = ("human", "user", "gpt", "assistant", "system")
_LABELS = {
    style: re.compile(rf"(?:\A\s*|\n\n)({'|'.join(names)}):(?: |\n|\Z)")
    for style, names in {
        "capital": [name.capitalize() for name in _SPEAKERS if name != "gpt"],
        "lower": list(_SPEAKERS),
    }.items()
}


def read_transcript(text: str) -> Messages | None:
    """Return the turns of a text such as "Human: ...\\n\\nAssistant: ..."; None if it is no transcript.

    A turn begins after an empty line with its speaker: `Human`, `User`, `Assistant`, `System`, or `human`,
    `user`, `gpt`, `assistant`, `system`. An empty turn at the end is the marker after which to answer.
    """
    for label in _LABELS.values():
        found = list(label.finditer(text))
        if not found or found[0].start() != 0:
            continue
        ends = [*(one.start() for one in found[1:]), len(text)]
        turns: Messages = []
        for one, end in zip(found, ends, strict=True):
            role, content = SPEAKERS[one[1].lower()], text[one.end() : end].strip()
            if turns and turns[-1]["role"] == role:
                # Two turns of one speaker; chat templates need them to alternate.
                turns[-1]["content"] += "\n\n" + content
            else:
                turns.append({"role": role, "content": content})
        if len(turns) > 1 and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
            turns.pop()
        return turns
    return None


def common_beginning(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Return how many messages two conversations share before the answers.

    The answer begins with the assistant: where the user's turns differ, it begins before them.
    """
    shared = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        shared += 1
    while shared and _role(chosen[shared]) != "assistant":
        shared -= 1
    return shared


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def common_text(chosen: str, rejected: str) -> int:
    """Return the length of the common beginning of two texts, up to the end of a word."""
    shared = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        shared += 1
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    return len(chosen[:shared].rstrip())


def _answers(row: dict[str, Any], name: str) -> str | Messages:
    """Return an answer: a text, or a list of messages."""
    value = row[name]
    if isinstance(value, str):
        return value
    messages: Messages = read_messages([value] if isinstance(value, dict) else value)
    return messages


def _prompt(row: dict[str, Any]) -> Messages | str:
    """Return the prompt's messages, or the reason why it is bad."""
    name = first_field(row, _PROMPTS)
    if name is None:
        return []
    value = row[name]
    if isinstance(value, list):
        messages: Messages = read_messages(value)
        return messages
    wrong = text_fault(value)
    if wrong is not None:
        return f"'{name}': {wrong}"
    given = first_field(row, INPUTS) if name == "instruction" else None
    if given is not None and isinstance(row[given], str) and filled(row[given]):
        value += "\n" + row[given]
    turns = read_transcript(value)
    return turns if turns and turns[-1]["role"] == "user" else [{"role": "user", "content": value}]


def _split_texts(
    row: dict[str, Any], chosen: str, rejected: str
) -> tuple[Messages, Messages, Messages] | str:
    """Return prompt and answers of two texts."""
    prompt = _prompt(row)
    if isinstance(prompt, str):
        return prompt
    written = row.get("prompt")
    if isinstance(written, str) and all(
        one.startswith(written) and one != written for one in (chosen, rejected)
    ):
        chosen, rejected = chosen[len(written) :], rejected[len(written) :]
    if not prompt:
        turns, others = read_transcript(chosen), read_transcript(rejected)
        if turns and others:
            return _split_messages([], turns, others)
        length = common_text(chosen, rejected)
        if not length:
            return "no prompt, and the answers have no common beginning"
        prompt = [{"role": "user", "content": chosen[:length].strip()}]
        chosen, rejected = chosen[length:], rejected[length:]
    answers = [[{"role": "assistant", "content": one}] for one in (chosen, rejected)]
    return prompt, answers[0], answers[1]


def _split_messages(
    prompt: Messages, chosen: Messages, rejected: Messages
) -> tuple[Messages, Messages, Messages] | str:
    """Return prompt and answers of two lists of messages, which may begin with the prompt."""
    if not chosen or not rejected:
        return "an answer without messages"
    shared = 0 if prompt and _role(chosen[0]) == "assistant" else common_beginning(chosen, rejected)
    if shared:
        # Also where a prompt is given: it is the first turn, or the last one before the answer.
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        return "no prompt, and the conversations have no common beginning"
    return prompt, chosen, rejected


def _score(row: dict[str, Any], names: Sequence[str]) -> float | None:
    """Return a finite number, also one that a CSV file holds as text."""
    name = first_field(row, names)
    return None if name is None else _number(row[name])


def _number(value: Any) -> float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_preference(row: dict[str, Any], take: Take) -> dict[str, Any] | str:
    """Return a record with `prompt`, `chosen`, `rejected`, and the taken conversation as `messages`.

    Scores become `score_chosen` and `score_rejected`. Returns the reason instead if the record is bad.
    """
    chosen, rejected = _answers(row, "chosen"), _answers(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        parts = _split_texts(row, chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt = _prompt(row)
        parts = prompt if isinstance(prompt, str) else _split_messages(prompt, chosen, rejected)
    else:
        return "'chosen' and 'rejected' are of different types"
    if isinstance(parts, str):
        return parts
    prompt = system_message(row, SYSTEM, parts[0])
    answers = {"chosen": parts[1], "rejected": parts[2]}
    for name, answer in answers.items():
        wrong = content_fault({"messages": [*prompt, *answer]}, questions=False)
        if wrong is not None:
            return f"{name}: {wrong}"
    scores = {name: _score(row, names) for name, names in _SCORES.items()}
    return {
        **{name: value for name, value in row.items() if name not in (*PREFERENCE_FIELDS, "text")},
        "prompt": prompt,
        **answers,
        **{name: score for name, score in scores.items() if score is not None},
        "messages": [*prompt, *answers["rejected" if take == "rejected" else "chosen"]],
    }


def read_truth(value: Any) -> bool | None:
    """Return a truth value, also one that a CSV file holds as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.lower())
    return value if isinstance(value, bool) else None


def read_unpaired(row: dict[str, Any], take: Take) -> dict[str, Any] | str | None:
    """Return the chat of a record with one answer and its `label`; None if it is not an answer to take.

    label: true for a good answer (chosen), false for a bad one (rejected).
    """
    label = read_truth(row["label"])
    if take != "all" and label != (take == "chosen"):
        return None
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion", *SYSTEM)}
    rest["label"] = label
    if isinstance(row.get("messages"), list):
        messages = read_messages(row["messages"])
        return {**rest, "messages": system_message(row, SYSTEM, messages)}
    prompt, completion = _prompt(row), row["completion"]
    if isinstance(prompt, str):
        return prompt
    answer = _as_messages(completion)
    return {**rest, "messages": system_message(row, SYSTEM, [*prompt, *answer])}


def read_scored(row: dict[str, Any], take: Take) -> dict[str, Any] | str | None:
    """Return a record with `prompt`, `completions` and `scores`, and the best completion as `messages`.

    `rejected` takes the worst one. Returns the reason instead if the record is bad.
    """
    prompt, completions, scores = _prompt(row), row["completions"], row["scores"]
    if isinstance(prompt, str):
        return prompt
    if not isinstance(completions, list) or not isinstance(scores, list) or not completions:
        return "'completions' and 'scores' are not two lists"
    if len(completions) != len(scores):
        return f"{len(scores)} scores for {len(completions)} completions"
    found = [_number(score) for score in scores]
    if None in found:
        return "a score is not a finite number"
    prompt = system_message(row, SYSTEM, prompt)
    answers = [_as_messages(one) for one in completions]
    for answer in answers:
        wrong = content_fault({"messages": [*prompt, *answer]}, questions=False)
        if wrong is not None:
            return f"completions: {wrong}"
    numbers = [score for score in found if score is not None]
    best = numbers.index(min(numbers) if take == "rejected" else max(numbers))
    return {
        **{name: value for name, value in row.items() if name not in (*PREFERENCE_FIELDS, "text")},
        "prompt": prompt,
        "completions": answers,
        "scores": numbers,
        "messages": [*prompt, *answers[best]],
    }


def _as_messages(answer: Any) -> Messages:
    """Return an answer as messages of the assistant."""
    if isinstance(answer, list):
        messages: Messages = read_messages(answer)
        return messages
    return [{"role": "assistant", "content": answer}]
