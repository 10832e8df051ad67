"""Read rows of data files of any supported kind, streaming, each with its location.

Kinds: `.txt`, `.jsonl` (`.ndjson`, `.json`), `.csv` (`.tsv`), `.parquet`, `.arrow` (`.feather`), `.orc`; each
also with `.gz`, `.bz2`, `.xz` or `.zst`. A line, a cell and a record have at most 64 MiB; a longer one is a
bad record.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

from koine.data.csv_rows import OpenQuoteError, read_csv_rows
from koine.data.decompression import COMPRESSIONS, decompressed
from koine.data.json_rows import Row, UnendingError, read_json_rows
from koine.data.lines import in_utf8, lines
from koine.data.piped import shown_name
from koine.data.tables import ALL, Columns, TableError, read_arrow, read_orc, read_parquet
from koine.errors import UserError, did_you_mean, first_line
from koine.fields import check_file_name
from koine.files import hide_temporary_name, read_json, walk

TextUnit = Literal["paragraph", "line", "file"]
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".lz4", ".br", ".lzo", ".z")
_MAX_PARAGRAPH = 2**20
"""Most characters of a text without an empty line that become one document, to bound memory."""
_MAX_FILE = 2**28
"""Most characters of a whole file that is read as one document."""


def _read_txt(file: IO[bytes], unit: TextUnit) -> Iterator[Row]:
    """Yield the documents of a plain text: paragraphs, lines, or the file.

    Paragraphs are separated by empty lines; very long ones are cut at a line end.
    """
    collected: list[str] = []
    first, size = 1, 0
    number = 0
    for number, raw in enumerate(lines(in_utf8(file)), 1):
        if isinstance(raw, str):
            yield f"line {number}", raw
            continue
        try:
            line = raw.decode("utf-8")
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
            elif size > _MAX_FILE:
                yield f"line {first}", f"a document longer than {_MAX_FILE} characters"
                return
    if any(line.strip() for line in collected):
        yield f"line {first}", {"text": "\n".join(collected)}


_TEXTS: dict[str, Callable[[IO[bytes], TextUnit], Iterator[Row]]] = {
    ".txt": _read_txt,
    ".jsonl": read_json_rows,
    ".ndjson": read_json_rows,
    ".csv": lambda file, _: read_csv_rows(file, ","),
    ".tsv": lambda file, _: read_csv_rows(file, "\t"),
}
_TABLES: dict[str, Callable[[IO[bytes], Columns], Iterator[Row]]] = {
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".orc": read_orc,
}
KINDS = (*_TEXTS, *_TABLES)
JSON = ".json"
"""Read if it is named, or alone in a folder: beside other data, such files mostly describe it."""
_DESCRIPTIONS = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "manifest.json",
}
_DESCRIPTIONS |= {
    "artifact.json",
    "metrics.json",
    "report.json",
    "roles.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def _kind_named(path: Path) -> str | None:
    """Return the lower-case extension before that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else None


def kind_of(path: Path) -> str | None:
    """Return the extension that decides how a file in a folder is read; `None` if it is not data."""
    kind = _kind_named(path)
    return kind if kind in KINDS else None


def _unknown_kind(path: Path) -> UserError:
    name = "".join(path.suffixes)
    if path.suffix.lower() in ARCHIVES or ".tar" in path.suffixes:
        return UserError(
            f"an archive '{name}' is not read", where=path, hint="unpack it, and give the folder"
        )
    packed = path.suffix if path.suffix.lower() in COMPRESSIONS else ""
    known = [extension + packed for extension in (*KINDS, JSON)]
    return UserError(
        f"a file of unknown kind '{name}'", where=path, hint=did_you_mean("".join(path.suffixes[-2:]), known)
    )


def read_rows(path: Path, *, unit: TextUnit = "paragraph", columns: Columns = ALL) -> Iterator[Row]:
    """Yield the rows of one file in order; `columns`: what is needed of a table.

    Errors about the copy of a pipe name the pipe. Raises `UserError` if the file is of no known kind,
    unreadable, or damaged so that the rest is lost.
    """
    with hide_temporary_name(shown_name(path), path):
        yield from _read_rows(path, unit, columns)


def _read_rows(path: Path, unit: TextUnit, columns: Columns) -> Iterator[Row]:
    kind = kind_of(path) or (".jsonl" if _kind_named(path) == JSON else None)
    if kind is None:
        raise _unknown_kind(path)
    damaged = "it is truncated or damaged; copy or write it again"
    try:
        with decompressed(path) as file:
            if kind in _TABLES:
                yield from _TABLES[kind](file, columns)
            else:
                yield from _TEXTS[kind](file, unit)
    except TableError as error:
        raise UserError(str(error), where=path, hint=damaged) from None
    except UnendingError:
        raise UserError("ends inside a JSON array or object", where=path, hint=damaged) from None
    except OpenQuoteError as error:
        hint = "close it, and write a quote inside a quoted cell twice"
        raise UserError(str(error), where=path, hint=hint) from None
    except PermissionError:
        raise UserError("cannot be read", where=path, hint="check its permissions") from None
    except OSError as error:
        _check_is_file_or_folder(path)
        reason = error.strerror or first_line(error)
        raise UserError(
            f"cannot be read ({reason})", where=path, hint="check the file and the disk"
        ) from None


_SPLIT = re.compile(
    r"(?:^|[-_.])(train|training|test|testing|valid|validation|val|dev|eval)(?=$|[-_.])", re.IGNORECASE
)


def split_of(path: Path, root: Path) -> str | None:
    """Return the split in a file's name or in that of a folder above it; `None` if neither names one."""
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
    """Return the data files below a path, in the order in which they are read (sorted by name).

    If files of a folder name their split (`train-00000-of-00002.parquet`, `test/data.jsonl`), only those of
    `split` are taken, and those that name none; `split="all"` takes everything. Folders written by
    `save_to_disk` are read by their `state.json`. Raises `UserError` if there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        _check_is_file_or_folder(path)
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        nearby = [entry.name for entry in beside if not entry.name.startswith(".")]
        raise UserError(
            "no such file or folder", where=path, hint=did_you_mean(path.name, nearby) if nearby else None
        )
    found = _below(path) or _json_files(path)
    if split != "all":
        kept = _of_split(found, path, split)
        if found and not kept:
            splits = sorted({str(split_of(file, path)) for file in found})
            raise UserError(
                f"holds no files of the split '{split}'", where=path, hint=f"it has: {', '.join(splits)}, all"
            )
        found = kept
    if not found:
        raise UserError(
            "holds no data files",
            where=path,
            hint=f"known kinds: {', '.join(KINDS)}, also with {', '.join(COMPRESSIONS)}",
        )
    return found


def _of_split(files: list[Path], root: Path, split: str) -> list[Path]:
    """Return the files of a split, and those that name none.

    A split such as `train_sft` is only that one, where files are called so; `train` is all that begin so.
    """
    named = re.compile(rf"{re.escape(split)}(?=$|[-.])", re.IGNORECASE)
    exact = [file for file in files if any(named.match(part) for part in file.relative_to(root).parts)]
    if exact and not _SPLIT.fullmatch(split):
        return exact
    wanted = split_of(Path(split), Path()) or split
    return [file for file in files if split_of(file, root) in (None, wanted)]


def _check_is_file_or_folder(path: Path) -> None:
    """Raise `UserError` for a dangling link, a pipe, a device or a socket."""
    if path.is_symlink() and not path.exists():
        target = Path(os.path.realpath(path))
        leads = "back to itself" if target.is_symlink() else f"to {target}, which is not there"
        what = f"a link that leads {leads}"
        raise UserError(what, where=path, hint="fix or remove the link; is its disk mounted?")
    if path.exists():
        raise UserError(
            "a device or a socket, which holds no data", where=path, hint="give a file, a folder or a pipe"
        )


def _json_files(folder: Path) -> list[Path]:
    """Return the `.json` files of a folder without other data, except those that describe it."""
    return [file for file in walk(folder) if _kind_named(file) == JSON and file.name not in _DESCRIPTIONS]


def _below(folder: Path) -> list[Path]:
    """Return the data files that `walk` finds.

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
    """Return the files that `save_to_disk` of Hugging Face's `datasets` lists in a folder."""
    value = read_json(state)
    listed = value.get("_data_files") if isinstance(value, dict) else None
    items = listed if isinstance(listed, list) else [None]
    names = [item.get("filename") if isinstance(item, dict) else None for item in items]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(
            "lists no _data_files",
            where=state,
            hint="it is damaged; copy the data set again, or save it again",
        )
    files = [state.parent / check_file_name("the name of a file", name, where=state) for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"is missing; {state.name} lists it",
                where=file,
                hint="copy the data set whole, or save it again",
            )
    return files
