"""The records that an evaluation reads: all of a folder, or the split that was asked for, and never a part unasked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError

if TYPE_CHECKING:
    from koine.data.readers import TextUnit
    from koine.data.records import RecordReader


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How records are read, as `koine.data.read_records` takes it; `split` None: all, where a folder has one split or none."""

    split: str | None = None
    fields: Mapping[str, str] | None = None
    language: str | None = None
    domain: str | None = None
    max_bad_share: float = 0.01
    unit: TextUnit = "paragraph"


class Records:
    """The records of several sources, one after another, as often as they are iterated over.

    Raises `UserError` at once where a source is missing, or its files name several splits and none was asked for.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        reading: ReadOptions,
        *,
        option: str = "--split",
        questions: bool = False,
    ) -> None:
        """option: what a user types to choose a split. questions: as `koine.data.read_records` takes it."""
        self.readers = [_open(path, reading, option, questions) for path in paths]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for reader in self.readers:
            yield from reader

    def note_bad(self) -> None:
        """A `KoineWarning` where records were left out."""
        for reader in self.readers:
            if reader.bad:
                warnings.warn(
                    f"{reader.path}: {reader.bad} bad records were left out, the first: {reader.examples[0]}",
                    KoineWarning,
                    stacklevel=2,
                )


def _open(path: str | Path, reading: ReadOptions, option: str, questions: bool) -> RecordReader:
    from koine.data.readers import data_files, split_of
    from koine.data.records import locate, read_records

    split = reading.split
    if split is None:
        split, folder = "all", locate(path)
        named = {split_of(file, folder) for file in data_files(folder, split="all")} - {None}
        if len(named) > 1:
            raise UserError(
                f"its files are of several splits ({', '.join(sorted(map(str, named)))})",
                where=path,
                hint=f"say which is meant, for example {option} test, or all",
            )
    return read_records(
        path,
        fields=reading.fields,
        language=reading.language,
        domain=reading.domain,
        max_bad_share=reading.max_bad_share,
        unit=reading.unit,
        split=split,
        carry=("answer",),
        questions=questions,
    )
