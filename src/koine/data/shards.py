"""Token shards: memory-mapped ids, document offsets, and a description of each document.

| file | content |
|---|---|
| `manifest.json` | format, tokenizer, dtype, counts, and sha256 and size of every file |
| `shard-00000.tokens` | ids, uint16 (vocabularies up to 65,536) or uint32 |
| `shard-00000.offsets` | uint64 `[documents + 1]`: offset of each document |
| `shard-00000.mask` | uint8 per token, 1 on completions (chats and groups only) |
| `shard-00000.documents.parquet` | of each document id, language, domain, source, bytes (UTF-8, NFC) |

Groups (`koine.data.groups`) are documents too: `kind` in the manifest says which, and the table of documents
has the tree of each and what its record says of the completions.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from koine.data.groups import Group, GroupKind, Segment, TokenKind
from koine.errors import UserError
from koine.fields import Fields, check_file_name, short_repr
from koine.files import read_json_object, sha256_file

FORMAT = 1


def digest_of(manifest: dict[str, Any]) -> str:
    """Compute the sha256 of a manifest's content; the manifest holds it as `sha256`."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


@dataclass(frozen=True)
class DocumentInfo:
    """Description of a document."""

    record_id: str
    language: str
    domain: str
    source: str
    bytes: int


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a `manifest.json`.

    Raises `UserError` if it is damaged, changed, or of another format.
    """
    manifest = read_json_object(path, hint="it is damaged; tokenize again")
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"has format {short_repr(manifest.get('format'))}, this version reads {FORMAT}",
            where=path.parent,
            hint="tokenize again",
        )
    if manifest.get("sha256") != digest_of(manifest):
        raise UserError(
            "does not match its own sha256", where=path, hint="it was changed or damaged; tokenize again"
        )
    fields = Fields(manifest, path, hint_if_broken="tokenize again")
    chat = fields.boolean("chat")
    if "kind" in manifest:
        fields.text("kind", choices=get_args(GroupKind))
    fields.text("tokenizer")
    fields.text("dtype", choices=("uint16", "uint32"))
    fields.integer("vocab_size", low=1)
    files = fields.inner("files")
    for name in files.value:
        check_file_name("the name of a file", name, where=path)
        about = files.inner(name)
        about.integer("bytes", low=0)
        about.text("sha256")
    for shard in fields.entries("shards"):
        check_file_name("a shard", shard, where=path)
        for ending in (".tokens", ".offsets", ".documents.parquet", *([".mask"] if chat else [])):
            if shard + ending not in files.value:
                raise UserError(f"lists no {shard}{ending}", where=path, hint="tokenize again")
    languages = fields.inner("languages")
    for code in languages.value:
        totals = languages.inner(code)
        for what in ("documents", "tokens", "bytes"):
            totals.integer(what, low=0)
    return manifest


class TokenSource:
    """A folder of token shards, opened for reading. Documents are numbered through all shards.

    Raises `UserError` if a file is missing or differs from the manifest (its sha256 only with `verify`).
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        if not (self.path / "manifest.json").exists():
            raise UserError(
                "holds no token shards (manifest.json is missing)",
                where=self.path,
                hint="write them with `koine data tokenize`",
            )
        self.manifest: dict[str, Any] = read_manifest(self.path / "manifest.json")
        self._check_files(verify)
        dtype = np.dtype(self.manifest["dtype"])
        self._tokens, self._masks, offsets = [], [], []
        for name in self.manifest["shards"]:
            self._tokens.append(np.memmap(self.path / f"{name}.tokens", dtype=dtype, mode="r"))
            offsets.append(np.fromfile(self.path / f"{name}.offsets", dtype=np.uint64).astype(np.int64))
            if self.manifest["chat"]:
                self._masks.append(np.memmap(self.path / f"{name}.mask", dtype=np.uint8, mode="r"))
        self._starts = np.concatenate([o[:-1] for o in offsets]) if offsets else np.zeros(0, np.int64)
        self.lengths: NDArray[np.int64] = (
            np.concatenate([np.diff(o) for o in offsets]) if offsets else np.zeros(0, np.int64)
        )
        """Tokens of each document."""
        self._first = np.cumsum([0, *[len(o) - 1 for o in offsets]])

    def _check_files(self, verify: bool) -> None:
        """Raise `UserError` for a file that differs from the manifest."""
        for name, about in self.manifest["files"].items():
            file = self.path / name
            if not file.exists():
                raise UserError("is missing", where=file, hint="tokenize again, or copy the folder whole")
            if file.stat().st_size != about["bytes"]:
                raise UserError(
                    f"has {file.stat().st_size} bytes, the manifest says {about['bytes']}",
                    where=file,
                    hint="it is truncated or was changed; tokenize again",
                )
            if verify and sha256_file(file) != about["sha256"]:
                raise UserError(
                    "does not match the sha256 in the manifest",
                    where=file,
                    hint="it is damaged; tokenize again, or copy the folder again",
                )

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of the tokenizer that made the ids."""
        return str(self.manifest["tokenizer"])

    @property
    def vocab_size(self) -> int:
        """Size of that tokenizer's vocabulary."""
        return int(self.manifest["vocab_size"])

    @property
    def chat(self) -> bool:
        """Whether the documents are chats with a mask of completion tokens."""
        return bool(self.manifest["chat"])

    @property
    def kind(self) -> TokenKind:
        """What the documents are: texts or chats, or groups of one kind."""
        return cast(TokenKind, self.manifest.get("kind", "documents"))

    def __len__(self) -> int:
        return len(self.lengths)

    def locate(self, document: int) -> tuple[int, int]:
        """Return the shard of a document, and its index inside."""
        shard = int(np.searchsorted(self._first, document, side="right")) - 1
        return shard, document - int(self._first[shard])

    def number(self, shard: int, index: int) -> int:
        """Return the document at an index of a shard; the inverse of `locate`."""
        return int(self._first[shard]) + index

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Return ids `[start, end)` of a document, without a copy."""
        return self._slice(self._tokens, document, start, end)

    def mask(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        """Return the completion mask of tokens `[start, end)` of a chat: 1 on completions."""
        return self._slice(self._masks, document, start, end)

    def _slice(self, arrays: list[Any], document: int, start: int, end: int | None) -> NDArray[Any]:
        shard, _ = self.locate(document)
        first = int(self._starts[document])
        length = int(self.lengths[document])
        out: NDArray[Any] = arrays[shard][first + start : first + (length if end is None else end)]
        return out

    @cached_property
    def _documents(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        tables = [pq.read_table(self.path / f"{name}.documents.parquet") for name in self.manifest["shards"]]
        return pa.concat_tables(tables) if tables else None

    @cached_property
    def languages(self) -> NDArray[np.str_]:
        """Language code of each document."""
        if not len(self):
            return np.zeros(0, dtype=np.str_)
        return np.asarray(self._documents.column("language").to_numpy(zero_copy_only=False), dtype=np.str_)

    def info(self, document: int) -> DocumentInfo:
        """Return the description of a document."""
        row = self._documents.slice(document, 1).to_pylist()[0]
        return DocumentInfo(row["id"], row["language"], row["domain"], row["source"], row["bytes"])

    def segments(self, document: int) -> list[Segment]:
        """Return the tree of a group (`koine.data.groups`)."""
        starts, parents, lengths, completions = self._trees
        span = slice(starts[document], starts[document + 1])
        return [
            Segment(int(parent), int(length), bool(completion))
            for parent, length, completion in zip(
                parents[span], lengths[span], completions[span], strict=True
            )
        ]

    @cached_property
    def _trees(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return where each group's segments begin, and parent, length and kind of all segments."""
        columns = [self._documents.column(f"segment_{name}") for name in ("parent", "length", "completion")]
        sizes = columns[0].combine_chunks().value_lengths().to_numpy()
        flat = [column.combine_chunks().flatten().to_numpy(zero_copy_only=False) for column in columns]
        return np.concatenate([[0], np.cumsum(sizes)]), *flat

    def group(self, document: int, source: str) -> Group:
        """Return the description of a group; `source` is the name of the mixture's source."""
        row = self._documents.slice(document, 1).to_pylist()[0]
        return Group(
            record_id=row["id"],
            language=row["language"],
            source=source,
            document=document,
            kind=cast(GroupKind, self.kind),
            probability=row["probability"],
            margin=row["margin"],
            labels=tuple(row["labels"]),
            scores=tuple(row["scores"]),
        )

    def totals(self) -> dict[str, dict[str, int]]:
        """Return documents, tokens and bytes by language."""
        value: dict[str, dict[str, int]] = self.manifest["languages"]
        return value
