"""Read records: one JSON object a document, checked as they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.data.formats import (
    BY_NAME,
    FORMAT_FIELDS,
    FORMATS,
    OWN,
    TRANSLATIONS,
    Format,
    RecordFormat,
    known_formats,
    recognise,
)
from koine.data.hub_data import dataset_folder
from koine.data.piped import shown_name
from koine.data.readers import TextUnit, data_files, read_rows
from koine.data.record_content import content_fault, is_blank, read_label
from koine.data.tables import Columns
from koine.errors import UserError, did_you_mean, printable
from koine.fields import check_number, short_repr
from koine.languages import language as find_language

Record = dict[str, Any]
"""`text` or `messages`, `language` (BCP-47), `domain`, `source`, `id`; other fields are kept."""

FIELDS = ("text", "messages", "language", "domain", "source", "id", "split")
MAPPABLE = tuple(dict.fromkeys((*FIELDS, *FORMAT_FIELDS)))
"""Fields that `fields=` may map: ours and those of the formats."""
_FIRST_CHECK = 1000
_SHOWN = 5
# Names of these fields in other tools, used if the record has no field of our name.
_ALIASES = {"language": ("lang",), "id": ("_id",)}
_LABELS = ("language", "domain", "source", "id")
_LONGEST_REASON = 300
_LONGEST_CODE = 100
_SHOWN_FIELDS = 8
BY_FIELDS = RecordFormat()
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
    records, also of skipped ones; `formats` counts the good ones by format, and `left_out` those answers that
    are not of the kind to take. The first record of a file that has the fields of a format decides for the
    file; chats and texts may stand in one file.
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
        record_format: RecordFormat = BY_FIELDS,
        accept: Callable[[Record], str | None] | None = None,
    ) -> None:
        check_number("max_bad_share", max_bad_share, low=0, high=1)
        for name in fields or {}:
            if name not in MAPPABLE:
                raise UserError(
                    f"unknown field '{name}' in the field mapping", hint=did_you_mean(name, MAPPABLE)
                )
        self.path = path
        self.fields = dict(fields or {})
        self.language = None if language is None else find_language(language).code
        self.domain = domain
        self.max_bad_share = max_bad_share
        self.unit = unit
        self.questions = questions
        self.languages = None if languages is None else {find_language(code).code for code in languages}
        self.record_format = record_format
        self.accept = accept
        self.files = data_files(dataset_folder(path), split=split)
        self.columns = self._columns(carry)
        self.good = 0
        self.bad = 0
        self.left_out = 0
        self.formats: Counter[str] = Counter()
        self._format: Format | None = None
        # Of records without the fields of any format: the first one's file and fields, and their number.
        self._unknown: tuple[Path, list[str]] | None = None
        self._unknown_count = 0
        self.examples: list[BadRecord] = []
        self.present: set[str] = set()

    def _columns(self, carry: Collection[str] | None) -> Columns:
        """Return the columns to read of tables."""
        aliases = [alias for several in _ALIASES.values() for alias in several]
        chosen = self.record_format.name
        wanted = FORMAT_FIELDS if chosen is None else BY_NAME[chosen].columns
        content = tuple(self.fields.get(name, name) for name in wanted)
        return Columns(content, tuple(self.fields.values()), (*content, *FIELDS, *aliases), carry)

    def __iter__(self) -> Iterator[Record]:
        self.good, self.bad, self.left_out, self.examples, self.present = 0, 0, 0, [], set()
        self.formats.clear()
        self._unknown, self._unknown_count = None, 0
        codes: dict[str, str] = {}
        for file in self.files:
            self._format = None if self.record_format.name is None else BY_NAME[self.record_format.name]
            for place, row in read_rows(file, unit=self.unit, columns=self.columns):
                for part in (row,) if isinstance(row, str) else self._translations(row):
                    found = part if isinstance(part, str) else self._record(part, file, place, codes)
                    if isinstance(found, str):
                        self.bad += 1
                        if len(self.examples) < _SHOWN:
                            self.examples.append(BadRecord(shown_name(file), place, found))
                        if self.good + self.bad >= _FIRST_CHECK:
                            self.check_bad_share()
                    elif found is None:
                        self.left_out += 1
                    else:
                        self.good += 1
                        self.present.add(found["language"])
                        if self.languages is None or found["language"] in self.languages:
                            yield found
        self.check_bad_share()
        if not self.good and not self.present:
            self._check_empty()

    def _check_empty(self) -> None:
        """Raise `UserError` for a source without good records."""
        if self.left_out:
            raise UserError(
                f"none of the {self.left_out} answers is labelled as {self.record_format.take}",
                where=str(self.path),
                hint="take the others: chosen (label true) or rejected (false)",
            )
        self._check_recognised()
        raise UserError("holds no records", where=str(self.path), hint="the files are empty")

    def _check_recognised(self) -> None:
        """Raise `UserError` if all records are bad because they have the fields of no format."""
        if self.good or not self._unknown or self._unknown_count < self.bad:
            return
        file, fields = self._unknown
        raise UserError(
            f"records of no known format, with the fields {', '.join(fields[:_SHOWN_FIELDS])}",
            where=file,
            hint=f"known: {known_formats()}. Map fields (--field text=COLUMN), or name the format (--format)",
        )

    def check_bad_share(self) -> None:
        """Raise `UserError` if too many records are bad."""
        total = self.good + self.bad
        if self.bad > self.max_bad_share * total:
            self._check_recognised()
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
            code: text for code, text in texts.items() if not (text is None or text == "" or is_blank(text))
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
        file = shown_name(file)
        return file.name.split(".")[0] if name == "source" else f"{file.name}:{place.split()[-1]}"

    def _form(self, row: Record, file: Path) -> Record | str | None:
        """Return a row in the form of our records, the reason why it is bad, or None: it is left out."""
        own = self._format is None or (self.record_format.name is None and self._format in OWN)
        mapped = tuple(one for one in OWN if one.name in self.fields)
        among = mapped or (FORMATS if self._format is None else OWN)
        found = recognise(row, among) if own else self._format
        if self._format is None:
            self._format = found
        fields = [f"{name} (null)" if value is None else str(name) for name, value in row.items()]
        names = ", ".join(fields[:_SHOWN_FIELDS])
        if found is None and self._format is None:
            self._unknown_count += 1
            self._unknown = self._unknown or (file, fields)
            return f"no known format (it has {names})"
        if self.record_format.name is None and not mapped and (found is None or not found.fits(row)):
            read, other = found or self._format, recognise(row)
            if read is not None and other is not None:
                return (
                    f"has the fields of the format {other.name}, and its file is read as {read.name} "
                    "(one format a file)"
                )
        if found is None:
            return f"neither 'text' nor 'messages' (it has {names})"
        if not found.fits(row):
            needs = found.needs.replace("|", " or ")
            return f"lacks fields of the format {found.name}: {needs} (it has {names})"
        formed = found.read(row, self.record_format.take)
        if isinstance(formed, dict):
            self.formats[found.name] += 1
        return formed

    def _record(self, row: Record, file: Path, place: str, codes: dict[str, str]) -> Record | str | None:
        """Return the record of a row, the reason why it is bad, or None: it is left out."""
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
        formed = self._form(record, file)
        if not isinstance(formed, dict):
            return formed
        record = formed
        if "split" in record and not isinstance(record["split"], str):
            # Not the name of a split, but the number of a class, or empty.
            record.pop("split")
        wrong = content_fault(record, questions=self.questions)
        if wrong is not None:
            return wrong
        for name in _LABELS:
            value = record.get(name)
            if type(value) is str and value and value.isascii():
                continue
            label = read_label(value, number=name == "id")
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
        wrong = None if self.accept is None else self.accept(record)
        return record if wrong is None else wrong


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
    record_format: RecordFormat = BY_FIELDS,
    accept: Callable[[Record], str | None] | None = None,
) -> RecordReader:
    """Stream the records of a file, a folder, a data set on disk, or one of the hub (`OWNER/NAME`).

    `-` is standard input. It and pipes are copied to a temporary file first (`koine.data.piped`).

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
        record_format: the format of the records, and which answers of preference records are read.
        accept: returns why a record is bad, a clause, where it is for this use; None where it is good.
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
        record_format=record_format,
        accept=accept,
    )
