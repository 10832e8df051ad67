"""Read records: one JSON object a document, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from koine.data.readers import TextUnit, data_files, read_rows
from koine.data.tables import Columns
from koine.errors import UserError, did_you_mean, first_line, printable
from koine.fields import short_repr
from koine.languages import language as find_language

Record = dict[str, Any]
"""`text` or `messages`, `language` (BCP-47), `domain`, `source`, `id`; other fields are kept."""

FIELDS = ("text", "messages", "language", "domain", "source", "id", "split")
ROLES = ("system", "user", "assistant")
HUB = "hub:"
_FIRST_CHECK = 1000
_SHOWN = 5
# Names of these fields in other tools, used if the record has no field of our name.
_ALIASES = {"language": ("lang",), "id": ("_id",)}
CHATS, TRANSLATIONS = "conversations", "translation"
"""ShareGPT's name for messages, and the usual name of parallel texts in translation data.

Used if a record has neither text nor messages.
"""
_SPEAKERS = {"human": "user", "gpt": "assistant"}
_LABELS = ("language", "domain", "source", "id")
_LONGEST_REASON = 300
_LONGEST_CODE = 100
UNKNOWN_LANGUAGE = "und"
TRANSLATED = "translated"
"""Field of records that come from one row with its text in several languages; they share their `id`."""


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out."""

    file: Path
    place: str
    reason: str

    def __str__(self) -> str:
        # The reason may quote the data: shown in one line of bounded length that any terminal can print.
        reason = printable(self.reason[:_LONGEST_REASON])
        return f"{self.file}, {self.place}: {reason}{'...' if len(self.reason) > _LONGEST_REASON else ''}"


class RecordReader:
    """Iterates over the good records of a path; `bad` counts the others, `examples` holds the first few.

    Iterating raises `UserError` once more than `max_bad_share` of the records are bad (checked after the
    first 1,000 and at the end), or if there is no record at all. `present` holds the languages of all
    records, also of skipped ones.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fields: Mapping[str, str] | None = None,
        language: str | None = None,
        domain: str | None = None,
        max_bad_share: float = 0.01,
        unit: TextUnit = "paragraph",
        split: str = "train",
        languages: Collection[str] | None = None,
        carry: Collection[str] | None = None,
        questions: bool = False,
    ) -> None:
        if not 0.0 <= max_bad_share <= 1.0:
            raise UserError(f"max_bad_share is {max_bad_share}", hint="it is a share between 0 and 1")
        for name in fields or {}:
            if name not in FIELDS:
                raise UserError(
                    f"unknown field '{name}' in the field mapping", hint=did_you_mean(name, FIELDS)
                )
        self.path = path
        self.fields = dict(fields or {})
        self.language = None if language is None else find_language(language).code
        self.domain = domain
        self.max_bad_share = max_bad_share
        self.unit = unit
        self.questions = questions
        self.languages = None if languages is None else {find_language(code).code for code in languages}
        self.files = data_files(locate(path), split=split)
        self.columns = self._columns(carry)
        self.good = 0
        self.bad = 0
        self.examples: list[BadRecord] = []
        self.present: set[str] = set()

    def _columns(self, carry: Collection[str] | None) -> Columns:
        """Return the columns to read of tables."""
        text, messages = (self.fields.get(name, name) for name in ("text", "messages"))
        aliases = [alias for several in _ALIASES.values() for alias in several]
        content = (text, messages, CHATS, TRANSLATIONS)
        return Columns(content, tuple(self.fields.values()), (*content, *FIELDS, *aliases), carry)

    def __iter__(self) -> Iterator[Record]:
        self.good, self.bad, self.examples, self.present = 0, 0, [], set()
        codes: dict[str, str] = {}
        for file in self.files:
            for place, row in read_rows(file, unit=self.unit, columns=self.columns):
                for part in (row,) if isinstance(row, str) else self._translations(row):
                    found = part if isinstance(part, str) else self._record(part, file, place, codes)
                    if isinstance(found, str):
                        self.bad += 1
                        if len(self.examples) < _SHOWN:
                            self.examples.append(BadRecord(file, place, found))
                        if self.good + self.bad >= _FIRST_CHECK:
                            self._check()
                    else:
                        self.good += 1
                        self.present.add(found["language"])
                        if self.languages is None or found["language"] in self.languages:
                            yield found
        self._check()
        if not self.good and not self.present:
            raise UserError("holds no records", where=str(self.path), hint="the files are empty")

    def _check(self) -> None:
        """Raise `UserError` if too many records are bad."""
        total = self.good + self.bad
        if self.bad > self.max_bad_share * total:
            raise UserError(
                f"{self.bad} of {total} records are bad "
                f"({self.bad / total:.1%}, at most {self.max_bad_share:.1%} may be); the first is {self.examples[0]}",
                hint="fix the data, map its fields (--field text=COLUMN), or allow more (--max-bad)",
            )

    def _translations(self, row: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
        """Yield the row, or one per language of a row whose text is `{code: text}`; these share their `id`.

        A language without a text in this row gives no record: tables hold all languages in every row.
        """
        column = self.fields.get("text", "text")
        texts = row.get(column)
        if texts is None and "text" not in self.fields and isinstance(row.get(TRANSLATIONS), dict):
            row = dict(row)
            texts = row.pop(TRANSLATIONS)
        if not isinstance(texts, dict):
            yield row
            return
        language = self.fields.get("language", "language")
        there = {
            code: text for code, text in texts.items() if not (text is None or text == "" or _blank(text))
        }
        if not there:
            yield "the text is empty in every language"
        for code, text in there.items():
            if self.languages is not None and not self._wanted(code):
                continue
            yield {**row, column: text, language: code, TRANSLATED: True}

    def _wanted(self, code: str) -> bool:
        """Return whether a language is chosen, and add it to `present`."""
        try:
            found = find_language(code[:_LONGEST_CODE]).code
        except UserError:
            return False
        self.present.add(found)
        return self.languages is None or found in self.languages

    def _default(self, name: str, file: Path, place: str) -> str:
        """Return the default of a missing label."""
        if name == "language":
            return self.language or UNKNOWN_LANGUAGE
        if name == "domain":
            return self.domain or "text"
        return file.name.split(".")[0] if name == "source" else f"{file.name}:{place.split()[-1]}"

    def _record(self, row: dict[str, Any], file: Path, place: str, codes: dict[str, str]) -> Record | str:
        """Return the record of a row, or the reason why it is bad."""
        record = dict(row)
        for name, column in self.fields.items():
            if column not in row:
                return f"no field '{column}' (it has {', '.join(map(str, list(row)[:8]))})"
            record[name] = row[column]
            if column != name and column not in self.fields:
                record.pop(column)
        for name, aliases in _ALIASES.items():
            for alias in aliases:
                if record.get(name) is None and alias in record:
                    record[name] = record.pop(alias)
        if record.get("text") is None and record.get("messages") is None and CHATS in record:
            record["messages"] = record.pop(CHATS)
        if isinstance(record.get("messages"), list):
            record["messages"] = [_message(message) for message in record["messages"]]
        if "split" in record and not isinstance(record["split"], str):
            # Not the name of a split, but the number of a class, or empty.
            record.pop("split")
        wrong = _wrong_content(record, questions=self.questions)
        if wrong is not None:
            return wrong
        for name in _LABELS:
            value = record.get(name)
            if type(value) is str and value and value.isascii():
                continue
            label = _label(value, number=name == "id")
            if label is None:
                return f"the {name} is {short_repr(value)}, not a text"
            record[name] = label or self._default(name, file, place)
        code = record["language"]
        if code not in codes and code != UNKNOWN_LANGUAGE:
            try:
                codes[code] = find_language(code[:_LONGEST_CODE]).code
            except UserError as error:
                return str(error)
        record["language"] = codes.get(code, code)
        return record


def _label(value: Any, *, number: bool) -> str | None:
    """Return the text of a label, empty if there is none, or None if it is no label.

    NaN counts as none: pandas writes missing values so. number: numbers are labels too.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return ""
    if number and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, UUID):
        return str(value)
    return value if isinstance(value, str) and _surrogate(value) is None else None


def _surrogate(text: str) -> int | None:
    """Return the position of a lone surrogate in a text, which UTF-8 cannot hold."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return error.start
    return None


def _blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def _message(message: Any) -> Any:
    """Return a message with `role` and `content`.

    Also from ShareGPT's `from` and `value`, and from content in parts of text.
    """
    if not isinstance(message, dict):
        return message
    if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
        rest = {key: entry for key, entry in message.items() if key not in ("from", "value")}
        speaker = message["from"]
        message = {"role": _SPEAKERS.get(speaker, speaker), "content": message["value"], **rest}
    parts = message.get("content")
    if isinstance(parts, list) and parts:
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        whole = [text for text in texts if isinstance(text, str)]
        if len(whole) == len(parts):
            message = {**message, "content": "".join(whole)}
    # Other fields of a message are kept if they can be written as JSON.
    return {key: entry for key, entry in message.items() if key in ("role", "content") or _plain(entry)}


def _plain(value: Any) -> bool:
    """Return whether JSON in UTF-8 can hold a value."""
    if isinstance(value, str):
        return _surrogate(value) is None
    return value is None or isinstance(value, bool | int | float)


def _wrong_content(record: Record, *, questions: bool) -> str | None:
    """Return the reason why a record's text or messages are bad, or None."""
    text, messages = record.get("text"), record.get("messages")
    if messages is None:
        if text is None:
            return f"neither 'text' nor 'messages' (it has {', '.join(map(str, list(record)[:8]))})"
        return _wrong_text(text)
    if not isinstance(messages, list) or not messages:
        return "'messages' is not a list with at least one message"
    previous = None
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return f"message {number} is not an object with 'role' and 'content'"
        role = message["role"]
        if role not in ROLES:
            return f"message {number} has the role {short_repr(role)}; known: {', '.join(ROLES)}"
        if role == "system" and number > 1:
            return f"message {number} is a system message; only the first may be"
        if role == previous:
            return f"messages {number - 1} and {number} are both of the {role}"
        wrong = _wrong_text(message["content"])
        if wrong is not None:
            return f"message {number}: {wrong}"
        previous = role
    if previous == "assistant" or (questions and _asks(record)):
        return None
    return "the last message is not the assistant's"


def _asks(record: Record) -> bool:
    """Return whether a record is a question with its answer beside the messages.

    The messages of a question end with the user's turn.
    """
    answer = record.get("answer")
    return record["messages"][-1]["role"] == "user" and isinstance(answer, str) and bool(answer.strip())


def _wrong_text(text: Any) -> str | None:
    """Return the reason why a text is bad, or None."""
    if not isinstance(text, str):
        return f"the text is {type(text).__name__}, not a string"
    if not text.strip():
        return "the text is empty"
    if "\0" in text:
        return "the text holds NUL characters"
    half = _surrogate(text)
    return None if half is None else f"the text holds a lone surrogate at character {half}"


def locate(path: str | Path) -> Path:
    """Return the local path of a source; of `hub:OWNER/NAME`, the folder of its snapshot.

    Raises `UserError` if the hub cannot be reached or has no such data set.
    """
    text = str(path)
    if not text.startswith(HUB):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils import HFValidationError

    try:
        return Path(snapshot_download(text.removeprefix(HUB), repo_type="dataset"))
    except RepositoryNotFoundError:
        raise UserError(
            f"the hub has no data set '{text.removeprefix(HUB)}'", hint="check its name and your access"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, HFValidationError) as error:
        raise UserError(
            f"'{text}' cannot be fetched from the hub ({first_line(error)})",
            hint="check the name and the connection, or give a local folder",
        ) from None


def read_records(
    path: str | Path,
    *,
    fields: Mapping[str, str] | None = None,
    language: str | None = None,
    domain: str | None = None,
    max_bad_share: float = 0.01,
    unit: TextUnit = "paragraph",
    split: str = "train",
    languages: Collection[str] | None = None,
    carry: Collection[str] | None = None,
    questions: bool = False,
) -> RecordReader:
    """Stream the records of a file, a folder, a local Hugging Face data set or `hub:OWNER/NAME`.

    A row whose text (or `translation`) is an object `{code: text}` gives one record for each language that
    has a text, all with the row's `id` and `"translated": true`.

    Args:
        path: the source.
        fields: our field name -> the data's (`{"text": "content"}`).
        language, domain: for records without one.
        max_bad_share: a larger share of bad records raises `UserError` with the first one's file and line.
        unit: what a document is in a `.txt` file.
        split: the files of a folder to read, if their names name a split; "all" for all.
        languages: skip records in other languages.
        carry: fields to keep besides ours, so that no other column of a table is read; `None`: all.
        questions: messages may end with the user's turn if the record has an `answer`.
    """
    return RecordReader(
        path,
        fields=fields,
        language=language,
        domain=domain,
        max_bad_share=max_bad_share,
        unit=unit,
        split=split,
        languages=languages,
        carry=carry,
        questions=questions,
    )
