"""Rows of text files of any of the supported kinds, streaming, each with the place it came from.

Kinds: `.txt`, `.jsonl` (`.ndjson`), `.csv` (`.tsv`), `.parquet`, `.arrow`; each also with `.gz`, `.xz` or `.zst` behind it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, cast

from koine.errors import UserError, did_you_mean, first_line
from koine.files import read_json, walk

TextUnit = Literal["paragraph", "line", "file"]
Row = tuple[str, dict[str, Any] | str]
"""Where the row is (`line 12`), and the row, or what is wrong with it."""

_COMPRESSIONS = (".gz", ".xz", ".zst")
_MAX_LINE = 64 * 2**20
_MAX_PARAGRAPH = 2**20
"""Characters of a text without an empty line that are read as one document; memory must not grow with the file."""


def _read_txt(file: IO[bytes], unit: TextUnit) -> Iterator[Row]:
    """Documents of a plain text: paragraphs (between empty lines, cut at a line end where they are very long), lines, or the file."""
    collected: list[str] = []
    first, size = 1, 0
    number = 0
    for number, raw in enumerate(_lines(file), 1):
        if isinstance(raw, str):
            yield f"line {number}", raw
            continue
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield f"line {number}", f"not UTF-8 ({error.reason} at byte {error.start})"
            continue
        if unit == "line":
            if line.strip():
                yield f"line {number}", {"text": line}
        elif unit == "paragraph" and not line.strip():
            if collected:
                yield f"line {first}", {"text": "\n".join(collected)}
            collected, first, size = [], number + 1, 0
        else:
            collected.append(line)
            size += len(line) + 1
            if unit == "paragraph" and size >= _MAX_PARAGRAPH:
                yield f"line {first}", {"text": "\n".join(collected)}
                collected, first, size = [], number + 1, 0
    if any(line.strip() for line in collected):
        yield f"line {first}", {"text": "\n".join(collected)}


def _lines(file: IO[bytes]) -> Iterator[bytes | str]:
    """Lines; one that would not fit in memory is reported in place of being read."""
    while line := file.readline(_MAX_LINE):
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield f"a line longer than {_MAX_LINE} bytes"
        else:
            yield line


def _read_jsonl(file: IO[bytes], _: TextUnit) -> Iterator[Row]:
    for number, raw in enumerate(_lines(file), 1):
        place = f"line {number}"
        if isinstance(raw, str):
            yield place, raw
            continue
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            yield place, f"not UTF-8 ({error.reason} at byte {error.start})"
        except json.JSONDecodeError as error:
            yield place, f"not JSON ({error.msg} at column {error.colno})"
        except RecursionError:
            yield place, "JSON nested too deeply"
        else:
            yield place, value if isinstance(value, dict) else f"a JSON {type(value).__name__}, not an object"


def _read_csv(file: IO[bytes], _: TextUnit, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_MAX_LINE)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Strict: else a quote that is never closed takes the rest of the file into one cell.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if reader.line_num > begin or "unexpected end" in str(error) or header is None:
                    # Other records may be inside this one: it cannot be counted as one bad record.
                    raise _DamagedError(
                        f"a quote in line {begin} is not closed as it should be (line {reader.line_num}: {error})",
                        "close it, and write a quote inside a quoted cell twice",
                    ) from None
                yield f"line {begin}", f"not CSV ({error})"
                continue
            if header is None:
                header = cells
                continue
            place = f"line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                yield place, f"{len(cells)} cells where the header has {len(header)}"
            elif any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
                yield place, "not UTF-8"
            else:
                yield place, dict(zip(header, cells, strict=True))
    finally:
        text.detach()


def _read_tsv(file: IO[bytes], unit: TextUnit) -> Iterator[Row]:
    return _read_csv(file, unit, delimiter="\t")


def _read_parquet(file: IO[bytes], _: TextUnit) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with _seekable(file) as seekable:
        try:
            for batch in pq.ParquetFile(seekable).iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise _DamagedError(f"not a whole Parquet file ({first_line(error)})") from None


def _read_arrow(file: IO[bytes], _: TextUnit) -> Iterator[Row]:
    import pyarrow as pa

    number = 0
    try:
        for batch in pa.ipc.open_stream(file):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise _DamagedError(f"not a whole Arrow stream ({first_line(error)})") from None


_READERS: dict[str, Callable[[IO[bytes], TextUnit], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


class _DamagedError(Exception):
    """The file cannot be read on from here."""

    def __init__(self, what: str, mend: str = "it is truncated or damaged; copy or write it again") -> None:
        super().__init__(what)
        self.mend = mend


@contextmanager
def _seekable(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Parquet is read from its end; a compressed one is unpacked beside, into a temporary file."""
    if file.seekable() and isinstance(file, io.BufferedReader):
        yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(file, unpacked)
        unpacked.seek(0)
        yield unpacked


class _Zstd(io.RawIOBase):
    """Frames of zstandard one after another; the library's own reader takes a file that ends in mid-frame for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw = raw
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new()
        self._started = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            packed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._started = self._new(), False
            packed = packed or self._raw.read(2**16)
            if not packed:
                if self._started:
                    raise EOFError("the file ends inside a frame")
                return 0
            self._started = True
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


@contextmanager
def _unpacked(path: Path) -> Iterator[IO[bytes]]:
    suffix = path.suffix.lower()
    with ExitStack() as stack:
        if suffix == ".gz":
            packed = stack.enter_context(gzip.open(path, "rb"))
            yield cast("IO[bytes]", packed)
        elif suffix == ".xz":
            yield stack.enter_context(lzma.open(path, "rb"))
        elif suffix == ".zst":
            raw = stack.enter_context(path.open("rb"))
            yield stack.enter_context(io.BufferedReader(_Zstd(raw), 2**16))
        else:
            yield stack.enter_context(path.open("rb"))


def kind_of(path: Path) -> str | None:
    """The extension that decides how a file is read, or `None` for a file that is not data."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in _COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1].lower() if suffixes and suffixes[-1].lower() in _READERS else None


def read_rows(path: Path, *, unit: TextUnit = "paragraph") -> Iterator[Row]:
    """The rows of one file in order.

    Raises `UserError` where the file is of no known kind, unreadable, or damaged in a way that hides the rest.
    """
    kind = kind_of(path)
    if kind is None:
        known = [extension + compression for extension in _READERS for compression in ("", *_COMPRESSIONS)]
        raise UserError(
            f"a file of unknown kind '{''.join(path.suffixes)}'",
            where=path,
            mend=did_you_mean("".join(path.suffixes[-2:]), known),
        )
    import zstandard

    try:
        with _unpacked(path) as file:
            yield from _READERS[kind](file, unit)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(
            f"the compressed data is damaged or cut off ({error})",
            where=path,
            mend="copy or download it again",
        ) from None
    except _DamagedError as error:
        raise UserError(str(error), where=path, mend=error.mend) from None
    except PermissionError:
        raise UserError("cannot be read", where=path, mend="check its permissions") from None


_SPLIT = re.compile(
    r"(?:^|[-_.])(train|training|test|testing|valid|validation|val|dev|eval)(?=$|[-_.])", re.IGNORECASE
)


def split_of(path: Path, root: Path) -> str | None:
    """The split that a file's name, or a folder's above it, says it belongs to; `None` where it says nothing."""
    for part in reversed(path.relative_to(root).parts):
        found = _SPLIT.search(part)
        if found:
            name = found.group(1).lower()
            return {
                "training": "train",
                "testing": "test",
                "valid": "validation",
                "val": "validation",
                "dev": "validation",
            }.get(name, name)
    return None


def data_files(path: Path, *, split: str = "train") -> list[Path]:
    """The data files below a path, in the order in which they are read (sorted by name).

    Of a folder whose files name their split (`train-00000-of-00002.parquet`, `test/data.jsonl`), only those of `split` are taken, and
    those that name none; `split="all"` takes everything. Folders written by `save_to_disk` are read by their `state.json`. Raises
    `UserError` where there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        nearby = [entry.name for entry in beside if not entry.name.startswith(".")]
        raise UserError(
            "no such file or folder", where=path, mend=did_you_mean(path.name, nearby) if nearby else None
        )
    found = _below(path)
    if split != "all":
        wanted = split_of(Path(split), Path()) or split
        kept = [file for file in found if split_of(file, path) in (None, wanted)]
        if found and not kept:
            splits = sorted({str(split_of(file, path)) for file in found})
            raise UserError(
                f"holds no files of the split '{split}'", where=path, mend=f"it has: {', '.join(splits)}, all"
            )
        found = kept
    if not found:
        raise UserError(
            "holds no data files",
            where=path,
            mend=f"known kinds: {', '.join(_READERS)}, also with {', '.join(_COMPRESSIONS)}",
        )
    return found


def _below(folder: Path) -> list[Path]:
    """The data files that `walk` finds.

    Of a folder written by `save_to_disk`, those that its `state.json` lists.
    """
    files = walk(folder)
    saved = {file.parent for file in files if file.name == "state.json"}
    found: list[Path] = []
    for file in files:
        if any(above in saved for above in file.parent.parents):
            continue
        if file.parent not in saved:
            found += [file] if kind_of(file) is not None else []
        elif file.name == "state.json":
            found += _of_state(file)
    return found


def _of_state(state: Path) -> list[Path]:
    """The files that `save_to_disk` of Hugging Face's `datasets` lists in a folder."""
    value = read_json(state)
    listed = value.get("_data_files") if isinstance(value, dict) else None
    names = [item.get("filename") if isinstance(item, dict) else None for item in listed or ()]
    if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            "lists no _data_files",
            where=state,
            mend="it is damaged; copy the data set again, or save it again",
        )
    files = [state.parent / str(name) for name in names]
    for name, file in zip(names, files, strict=True):
        # What lies elsewhere is not in the folder's fingerprint.
        if Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
            raise UserError(
                f"lists '{name}', which leads out of its folder", where=state, mend="save it again"
            )
        if not file.is_file():
            raise UserError(
                f"is missing; {state.name} lists it",
                where=file,
                mend="copy the data set whole, or save it again",
            )
    return files
