"""Look at the beginning of a data set before it is read as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from koine.data.formats import RecordFormat
from koine.data.records import UNKNOWN_LANGUAGE, read_records

PREVIEW_BYTES = 4 * 2**20
"""Text that is read, in UTF-8: a fraction of a second."""


@dataclass(frozen=True)
class DataPreview:
    """Content of the first records of a data set."""

    text_bytes: Mapping[str, int]
    """Bytes of text by language, without chats; `und`: no language is named."""
    documents: int
    chats: int
    chat_bytes: int
    chat_languages: tuple[str, ...]
    whole: bool
    """Whether the data ended before `PREVIEW_BYTES`, so that this is all of them."""
    file_bytes: int
    """Size of all files, read or not."""

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that are named, in order."""
        return tuple(sorted({*self.text_bytes, *self.chat_languages} - {UNKNOWN_LANGUAGE}))


def preview_records(
    path: Path, *, fields: Mapping[str, str], max_bad_share: float, record_format: str = ""
) -> DataPreview:
    """Read the first records of a file or folder.

    Raises `UserError` as reading everything would: no data files, an unknown field, too many bad records.
    """
    reader = read_records(
        path,
        fields=fields,
        max_bad_share=max_bad_share,
        split="all",
        carry=(),
        record_format=RecordFormat(record_format or None),
    )
    text_bytes: Counter[str] = Counter()
    languages: set[str] = set()
    documents, chats, chat_bytes, read, whole = 0, 0, 0, 0, True
    for record in reader:
        if "messages" in record:
            languages.add(record["language"])
            chats += 1
            length = sum(
                len(str(message["content"]).encode("utf-8", "surrogatepass"))
                for message in record["messages"]
            )
            chat_bytes += length
        else:
            length = len(record["text"].encode("utf-8", "surrogatepass"))
            text_bytes[record["language"]] += length
            documents += 1
        read += length
        if read > PREVIEW_BYTES:
            whole = False
            reader.check_bad_share()
            break
    size = sum(file.stat().st_size for file in reader.files)
    return DataPreview(dict(text_bytes), documents, chats, chat_bytes, tuple(sorted(languages)), whole, size)
