"""Read rows of CSV and TSV files, as spreadsheets and databases write them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import IO

from koine.data.json_rows import Row
from koine.data.lines import LONGEST_LINE, in_utf8, lines

_SEPARATORS = ",;\t|"


class OpenQuoteError(Exception):
    """A quote is not closed, so that its cell takes in the following records."""


class _Texts:
    """Iterates over the lines as text; a line that is too long is empty, and its reason in `wrong`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._lines = lines(in_utf8(file), ends=True)
        self.wrong: str | None = None

    def __iter__(self) -> Iterator[str]:
        for raw in self._lines:
            if isinstance(raw, str):
                self.wrong = raw
                yield "\n"
            else:
                yield raw.decode("utf-8", "surrogateescape")


def _separator(header: str, usual: str) -> str:
    """Return the separator of a header's cells: the usual one, or another that it uses (Excel's `;`)."""
    candidates: tuple[str, ...] = (usual, *_SEPARATORS)
    cells = {separator: len(next(csv.reader([header], delimiter=separator), ())) for separator in candidates}
    return next((separator for separator in candidates if cells[separator] > 1), usual)


def _names(header: list[str]) -> list[str]:
    """Return the columns' names; repeated ones are numbered from the second (`text.1`), as in pandas."""
    names: list[str] = []
    for name in header:
        name, number = name.strip(), 0
        while name and name in names:
            number += 1
            name = f"{header[len(names)].strip()}.{number}"
        names.append(name)
    return names


def read_csv_rows(file: IO[bytes], separator: str) -> Iterator[Row]:
    """Yield the rows of a file with a header.

    Raises `OpenQuoteError` if a quote is not closed on its own lines.
    """
    csv.field_size_limit(LONGEST_LINE)
    texts = _Texts(file)
    source = iter(texts)
    above, header = 0, ""
    for text in source:
        above += 1
        if text.lower().rstrip("\r\n") in (f"sep={separator}" for separator in _SEPARATORS):
            separator = text[4]
        elif text.strip():
            header = text
            break
    separator = _separator(header, separator)
    names: list[str] = []
    # Strict: otherwise a quote that is never closed puts the rest of the file into one cell.
    reader = csv.reader(_chained(header, source), delimiter=separator, strict=True)
    while True:
        begin = reader.line_num + above
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num - 1 + above
            if last > begin or "unexpected end" in str(error) or not names:
                # Other records may be inside this one: it cannot be counted as one bad record.
                raise OpenQuoteError(
                    f"a quote in line {begin} is not closed as it should be (line {last}: {error})"
                ) from None
            yield f"line {begin}", f"not CSV ({error})"
            continue
        place = f"line {reader.line_num - 1 + above}"
        if texts.wrong is not None:
            yield place, texts.wrong
            texts.wrong = None
        elif not names:
            names = _names(cells)
        elif cells:
            yield place, _row(names, cells)


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    """Yield the first line, then the rest."""
    yield first
    yield from rest


def _row(names: list[str], cells: list[str]) -> dict[str, object] | str:
    """Return the row of a line's cells, or the reason why it is bad."""
    if len(cells) > len(names) and not any(cells[len(names) :]):
        # Spreadsheets end a row with separators where another row is longer.
        cells = cells[: len(names)]
    if len(cells) != len(names):
        return f"{len(cells)} cells where the header has {len(names)}"
    if any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
        return "not UTF-8"
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}
