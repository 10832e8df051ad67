"""Records to evaluate on: a whole source, or the split that was chosen."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.data.formats import RecordFormat
    from koine.data.readers import TextUnit
    from koine.data.records import RecordReader


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Options for reading records; see `koine.data.read_records`.

    split: `None` reads all of a folder that has one split or none. record_format: `None`: by their fields.
    """

    split: str | None = None
    fields: Mapping[str, str] | None = None
    language: str | None = None
    domain: str | None = None
    max_bad_share: float = 0.01
    unit: TextUnit = "paragraph"
    record_format: RecordFormat | None = None


class Records:
    """The records of several sources, one after another; can be iterated over again.

    Raises `UserError` at once where a source is missing, or has several splits and none was chosen.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        options: RecordOptions,
        *,
        limit: int | None = None,
        split_option: str = "--split",
        questions: bool = False,
        preferred_split: str = "",
    ) -> None:
        """Open the sources.

        Args:
            paths: files, folders or data sets of the hub (`OWNER/NAME`).
            options: how to read them.
            limit: at most this many records of each language, from the start.
            split_option: the command's option that chooses a split, for error messages.
            questions: as `koine.data.read_records` takes it.
            preferred_split: split that is read of a source with several, where the options name none.
        """
        if limit is not None:
            check_integer("the limit", limit, low=1)
        self.limit = limit
        self.readers = [_open(path, options, split_option, questions, preferred_split) for path in paths]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        counts: dict[Any, int] = {}
        for reader in self.readers:
            for record in reader:
                language = record.get("language")
                counts[language] = counts.get(language, 0) + 1
                if self.limit is None or counts[language] <= self.limit:
                    yield record

    def warn_of_bad(self) -> None:
        """Warn (`KoineWarning`) of bad records that were left out."""
        for reader in self.readers:
            if reader.bad:
                warnings.warn(
                    f"{reader.path}: {reader.bad} bad records were left out, the first: {reader.examples[0]}",
                    KoineWarning,
                    stacklevel=2,
                )


def _open(
    path: str | Path, options: RecordOptions, split_option: str, questions: bool, preferred_split: str
) -> RecordReader:
    from koine.data.hub_data import dataset_folder
    from koine.data.readers import data_files, split_of
    from koine.data.records import BY_FIELDS, read_records

    split = options.split
    if split is None:
        split, folder = "all", dataset_folder(path)
        named = {split_of(file, folder) for file in data_files(folder, split="all")} - {None}
        if preferred_split in named:
            split = preferred_split
        elif len(named) > 1:
            raise UserError(
                f"its files are of several splits ({', '.join(sorted(map(str, named)))})",
                where=path,
                hint=f"say which is meant, for example {split_option} test, or all",
            )
    return read_records(
        path,
        fields=options.fields,
        language=options.language,
        domain=options.domain,
        max_bad_share=options.max_bad_share,
        unit=options.unit,
        split=split,
        carry=("answer", "kind", "fact"),
        questions=questions,
        record_format=options.record_format or BY_FIELDS,
    )
