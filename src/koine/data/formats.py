"""Formats of training data: recognised by their fields, read as records.

`FORMATS` is the one table of formats; the first whose fields a record has is its format. A format is two
functions: does a row have its fields, and the record that is made of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from koine.data.preferences import (
    CHATS,
    INPUTS,
    PREFERENCE_FIELDS,
    SYSTEM,
    Take,
    read_preference,
    read_scored,
    read_truth,
    read_unpaired,
)
from koine.data.record_content import (
    filled,
    first_field,
    read_messages,
    system_message,
    text_fault,
)
from koine.errors import UserError, did_you_mean

Row = dict[str, Any]
TRANSLATIONS = "translation"
"""The usual name of parallel texts in translation data."""
_OUTPUTS = ("output", "response")
_COMPLETIONS = ("completion", "response")
_QUESTIONS, _ANSWERS = ("question", "query"), ("answer", "response")


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what `--format` takes.
        needs: the fields by which it is recognised; of several names with a bar, one is enough.
        fits: whether a row has these fields.
        read: return the row as a record, the reason why it is bad, or None: leave it out.
        also: further fields that it reads.
    """

    name: str
    needs: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Take], Row | str | None]
    also: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that the format reads."""
        return (*(name for part in self.needs.split(", ") for name in part.split("|")), *self.also)


@dataclass(frozen=True)
class RecordFormat:
    """How to read records.

    Attributes:
        name: the format; None: recognised by the fields of each file's first records.
        take: of preference records, the answers to read.
    """

    name: str | None = None
    take: Take = "chosen"

    def __post_init__(self) -> None:
        if self.name is not None and self.name not in BY_NAME:
            raise UserError(f"unknown format '{self.name}'", hint=did_you_mean(self.name, BY_NAME))
        if self.take not in get_args(Take):
            raise UserError(f"no answers are called '{self.take}'", hint="take chosen or rejected")


def _has(row: Row, needs: str) -> bool:
    return all(first_field(row, part.split("|")) is not None for part in needs.split(", "))


def _without(row: Row, names: Iterable[str]) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _needs(needs: str) -> Callable[[Row], bool]:
    return lambda row: _has(row, needs)


def _unchanged(row: Row, _: Take) -> Row:
    return row


def _messages(row: Row, _: Take) -> Row:
    return {**row, "messages": read_messages(row["messages"])}


def _sharegpt(row: Row, _: Take) -> Row:
    name = first_field(row, CHATS)
    assert name is not None
    messages = system_message(row, SYSTEM, read_messages(row[name]))
    return {**_without(row, (*CHATS, *SYSTEM, "messages", "text")), "messages": messages}


def _turns(row: Row, pairs: Iterable[tuple[str, str]]) -> list[Any] | str:
    """Return messages of (role, field) pairs, or the reason why a field is bad."""
    messages: list[Any] = []
    for role, name in pairs:
        wrong = text_fault(row[name])
        if wrong is not None:
            return f"'{name}': {wrong}"
        messages.append({"role": role, "content": row[name]})
    return messages


def _history(value: Any) -> list[Any] | str:
    """Return the earlier turns of Alpaca's `history`: pairs of an instruction and a response."""
    messages: list[Any] = []
    for pair in value if isinstance(value, list | tuple) else [value] if filled(value) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            return "'history' is not a list of pairs"
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _alpaca(row: Row, _: Take) -> Row | str:
    given, output = first_field(row, INPUTS), first_field(row, _OUTPUTS)
    assert output is not None
    turns = _turns(row, [("user", "instruction"), ("assistant", output)])
    earlier = _history(row.get("history"))
    if isinstance(turns, str):
        return turns
    if isinstance(earlier, str):
        return earlier
    if given is not None and filled(row[given]):
        if not isinstance(row[given], str):
            return f"'{given}': {text_fault(row[given])}"
        turns[0]["content"] += "\n" + row[given]
    messages = system_message(row, SYSTEM, [*earlier, *turns])
    used = ("instruction", *INPUTS, *_OUTPUTS, *SYSTEM, "history", "text")
    return {**_without(row, used), "messages": messages}


def _prompt_completion(row: Row, _: Take) -> Row | str:
    completion = first_field(row, _COMPLETIONS)
    assert completion is not None
    return _pair(row, "prompt", completion)


def _question_answer(row: Row, _: Take) -> Row | str:
    question, answer = first_field(row, _QUESTIONS), first_field(row, _ANSWERS)
    assert question is not None
    assert answer is not None
    return _pair(row, question, answer)


def _pair(row: Row, asked: str, answered: str) -> Row | str:
    """Return a chat of a prompt and its answer: two texts, or two lists of messages."""
    rest = _without(row, (asked, answered, *SYSTEM))
    if isinstance(row[asked], list) and isinstance(row[answered], list):
        messages = [*read_messages(row[asked]), *read_messages(row[answered])]
        return {**rest, "messages": system_message(row, SYSTEM, messages)}
    turns = _turns(row, [("user", asked), ("assistant", answered)])
    return turns if isinstance(turns, str) else {**rest, "messages": system_message(row, SYSTEM, turns)}


def _is_preference(row: Row) -> bool:
    # A number would be the index of an answer that stands elsewhere.
    return all(isinstance(row.get(name), str | list | dict) for name in ("chosen", "rejected"))


def _is_unpaired(row: Row) -> bool:
    if read_truth(row.get("label")) is None:
        return False
    return _has(row, "prompt, completion") or isinstance(row.get("messages"), list)


FORMATS: Final = (
    Format(
        "preference",
        "chosen, rejected",
        _is_preference,
        read_preference,
        also=PREFERENCE_FIELDS,
    ),
    Format(
        "scored-completions",
        "completions, scores",
        lambda row: all(isinstance(row.get(name), list) for name in ("completions", "scores")),
        read_scored,
        also=PREFERENCE_FIELDS,
    ),
    Format(
        "unpaired-preference",
        "label, prompt|messages",
        _is_unpaired,
        read_unpaired,
        also=("completion", *SYSTEM),
    ),
    Format("messages", "messages", _needs("messages"), _messages),
    Format("sharegpt", "|".join(CHATS), _needs("|".join(CHATS)), _sharegpt, also=SYSTEM),
    Format(
        "alpaca",
        f"instruction, {'|'.join(_OUTPUTS)}",
        _needs(f"instruction, {'|'.join(_OUTPUTS)}"),
        _alpaca,
        also=(*INPUTS, *SYSTEM, "history"),
    ),
    Format("text", f"text|{TRANSLATIONS}", _needs(f"text|{TRANSLATIONS}"), _unchanged),
    Format(
        "prompt-completion",
        f"prompt, {'|'.join(_COMPLETIONS)}",
        _needs(f"prompt, {'|'.join(_COMPLETIONS)}"),
        _prompt_completion,
        also=SYSTEM,
    ),
    Format(
        "question-answer",
        f"{'|'.join(_QUESTIONS)}, {'|'.join(_ANSWERS)}",
        _needs(f"{'|'.join(_QUESTIONS)}, {'|'.join(_ANSWERS)}"),
        _question_answer,
        also=SYSTEM,
    ),
)
"""The formats, in the order in which they are tried."""
BY_NAME: Final[dict[str, Format]] = {one.name: one for one in FORMATS}
OWN: Final = tuple(BY_NAME[name] for name in ("messages", "sharegpt", "text"))
"""Formats that one file may hold side by side."""
FORMAT_FIELDS: Final = tuple(dict.fromkeys(name for one in FORMATS for name in one.columns))


def recognise(row: Row, among: Sequence[Format] = FORMATS) -> Format | None:
    """Return the first format whose fields a row has."""
    return next((one for one in among if one.fits(row)), None)


def known_formats() -> str:
    """Return the names of all formats with their fields, for messages."""
    return "; ".join(f"{one.name} ({one.needs.replace('|', ' or ')})" for one in FORMATS)
