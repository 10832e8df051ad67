"""Read rows of Parquet, Arrow, Feather and ORC files; only the columns that are needed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, TYPE_CHECKING, Any

from koine.data.json_rows import Row
from koine.errors import first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 256
_FEATHER_V1 = b"FEA1"
_ARROW_FILE = b"ARROW1"


class TableError(Exception):
    """The file cannot be read further."""


@dataclass(frozen=True)
class Columns:
    """Columns to read of a table.

    Attributes:
        content: at least one must be there, else all columns are read, so that an error can list them.
        mapped: all of these must be there.
        known: fields of records; bytes in them are text, and an unreadable cell makes a bad record.
        carried: other columns to read; None: all.
    """

    content: Collection[str] = ()
    mapped: Collection[str] = ()
    known: Collection[str] = ()
    carried: Collection[str] | None = None

    def of(self, names: list[str]) -> list[str] | None:
        """Return the columns to read of those in a table; None: all."""
        if self.carried is None or not set(self.mapped) <= set(names) or not set(self.content) & set(names):
            return None
        wanted = {*self.content, *self.mapped, *self.known, *self.carried}
        return [name for name in names if name in wanted]

    def needed(self, name: str) -> bool:
        """Return whether a record without this column's cell is bad."""
        return name in self.known or name in self.mapped or name in self.content


ALL = Columns()


@contextmanager
def _errors(what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise TableError(f"not a whole {what} ({first_line(error)})") from None


@contextmanager
def _seekable(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Return a seekable file.

    Parquet is read from its end, so a compressed file is decompressed to a temporary one.
    """
    if file.seekable():
        yield file
        return
    with tempfile.TemporaryFile() as decompressed:
        shutil.copyfileobj(file, decompressed)
        decompressed.seek(0)
        yield decompressed


def read_parquet(file: IO[bytes], columns: Columns = ALL) -> Iterator[Row]:
    """Yield rows of a Parquet file. Raises `TableError` if it is damaged."""
    import pyarrow.parquet as pq

    with _errors("Parquet file"), _seekable(file) as seekable:
        table = pq.ParquetFile(seekable)
        wanted = columns.of(table.schema_arrow.names)
        yield from _rows(table.iter_batches(batch_size=BATCH, columns=wanted), columns)


def read_arrow(file: IO[bytes], columns: Columns = ALL) -> Iterator[Row]:
    """Yield rows of Arrow data: a stream, a file (Feather version 2), or Feather version 1."""
    import pyarrow as pa
    import pyarrow.feather as feather

    assert isinstance(file, BufferedReader)
    first = file.peek(8)
    stream = not first.startswith((_ARROW_FILE, _FEATHER_V1))
    with ExitStack() as stack:
        stack.enter_context(_errors("Arrow stream" if stream else "Arrow file"))
        if not stream:
            file = stack.enter_context(_seekable(file))
        if first.startswith(_FEATHER_V1):
            batches = iter(feather.read_table(file).to_batches(BATCH))
        elif stream:
            batches = iter(pa.ipc.open_stream(file))
        else:
            opened = pa.ipc.open_file(file)
            batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
        yield from _rows((_checked(batch) for batch in batches), columns)


def _checked(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with its offsets and lengths checked.

    The library would follow wrong ones out of its memory.
    """
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as error:
        # Text that is no UTF-8 makes bad records, not a damaged file.
        if "UTF8" not in str(error):
            raise
    return batch


def read_orc(file: IO[bytes], columns: Columns = ALL) -> Iterator[Row]:
    """Yield rows of an ORC file. Raises `TableError` if it is damaged."""
    import pyarrow.orc as orc

    with _errors("ORC file"), _seekable(file) as seekable:
        table = orc.ORCFile(seekable)
        wanted = columns.of(table.schema.names)
        stripes = (table.read_stripe(number, columns=wanted) for number in range(table.nstripes))
        yield from _rows(stripes, columns)


def _rows(batches: Iterator[pa.RecordBatch], columns: Columns) -> Iterator[Row]:
    number = 0
    for whole in batches:
        for begin in range(0, whole.num_rows, BATCH):
            batch = whole.slice(begin, BATCH)
            wanted = columns.of(batch.schema.names)
            chosen = [
                (name, column)
                for name, column in zip(batch.schema.names, batch.columns, strict=True)
                if wanted is None or name in wanted
            ]
            names = _unique([name for name, _ in chosen])
            cells = [_cells(column, text=columns.needed(name)) for name, column in chosen]
            for row in zip(*cells, strict=True) if cells else ((),) * batch.num_rows:
                number += 1
                yield f"row {number}", _row(names, row, columns)


def _unique(names: list[str]) -> list[str]:
    """Make columns' names unique: the first one of a name keeps it."""
    found: list[str] = []
    for name in names:
        number = 0
        while name in found:
            number += 1
            name = f"{names[len(found)]}.{number}"
        found.append(name)
    return found


@dataclass(frozen=True)
class _Unreadable:
    """A cell without a value in Python."""

    why: str


def _row(names: list[str], cells: tuple[Any, ...], columns: Columns) -> dict[str, Any] | str:
    row = {}
    for name, cell in zip(names, cells, strict=True):
        if not isinstance(cell, _Unreadable):
            row[name] = cell
        elif columns.needed(name):
            return f"the field '{name}' cannot be read ({cell.why})"
    return row


def _cells(column: pa.Array, *, text: bool) -> list[Any]:
    """Return a column's values; `_Unreadable` for those without a value in Python.

    Such values are dates after 9999, or text that is no UTF-8. text: bytes are UTF-8, as from writers that do
    not mark strings (Spark, Impala).
    """
    try:
        values = column.to_pylist()
    except _NO_VALUE:
        values = [_cell(cell) for cell in column]
    return [_text_of(value) for value in values] if text and "binary" in str(column.type) else values


def _text_of(value: Any) -> Any:
    """Return a value with text in place of its bytes."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            return _Unreadable(f"not UTF-8, {error.reason} at byte {error.start}")
    if isinstance(value, list):
        parts: Any = [_text_of(entry) for entry in value]
        inside = parts
    elif isinstance(value, dict):
        parts = {key: _text_of(entry) for key, entry in value.items()}
        inside = parts.values()
    else:
        return value
    return next((entry for entry in inside if isinstance(entry, _Unreadable)), parts)


def _cell(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except _NO_VALUE as error:
        return _Unreadable(first_line(error))


_NO_VALUE = (ValueError, OverflowError, TypeError, NotImplementedError, KeyError)
"""Exceptions of `as_py` and `to_pylist` for cells without a value in Python.

ArrowInvalid is a ValueError.
"""
