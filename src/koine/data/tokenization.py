"""Tokenize text into token shards, restartable and in parallel.

The output is the same for any number of processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from koine.data.formats import RecordFormat
from koine.data.group_tokens import GROUP_FIELDS, GROUP_FORMATS, EncodedGroup, encode_group, group_fault
from koine.data.groups import GroupKind, TokenKind
from koine.data.readers import TextUnit
from koine.data.records import BY_FIELDS, Record, RecordReader, read_records
from koine.data.shards import FORMAT, digest_of
from koine.errors import UserError
from koine.fields import check_integer
from koine.files import (
    claim,
    clear_partials,
    fsync_directory,
    fsync_file,
    read_json,
    remove,
    sha256_file,
    write_json,
)
from koine.tokenizer import Tokenizer, load_tokenizer

SHARD_BYTES = 32 * 2**20


def tokenize(
    source: Path | str,
    tokenizer: Path,
    *,
    out: Path,
    workers: int = 1,
    fields: Mapping[str, str] | None = None,
    language: str | None = None,
    domain: str | None = None,
    max_bad_share: float = 0.01,
    unit: TextUnit = "paragraph",
    split: str = "train",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    record_format: RecordFormat = BY_FIELDS,
    kind: TokenKind = "documents",
    revision: str | None = None,
) -> RecordReader:
    """Write the token shards of a source into `out` (see `koine.data.shards`).

    A killed run leaves its finished shards beside `out`, and the same call continues after them. The result
    is byte for byte the same for any number of workers and interruptions. Memory: about `(2 + workers) *
    shard_bytes`.

    Args:
        source: a file, a folder, or a data set of the hub.
        tokenizer: folder of the tokenizer.
        out: folder to write.
        workers: processes.
        fields, language, domain, max_bad_share, unit, split, record_format: as in `read_records`.
        shard_bytes: bytes of text of a shard.
        overwrite: replace `out`.
        kind: what to make of a record: a document, or a group of completions of one prompt.
        revision: see `koine.data.group_tokens.encode_group`; None: no revisions.

    Returns:
        The reader, with its counts of good and bad records.

    Raises:
        UserError: the input is bad, `out` is not empty (unless `overwrite`), or a source mixes chats and
            texts.
    """
    if revision is not None and kind != "preferences":
        raise UserError("a revision turn is for preferences", hint="give --kind preferences with it")
    out, tokenizer = Path(out), Path(tokenizer)
    check_integer("workers", workers, low=1)
    reader = read_records(
        source,
        fields=fields,
        language=language,
        domain=domain,
        max_bad_share=max_bad_share,
        unit=unit,
        split=split,
        carry=() if kind == "documents" else GROUP_FIELDS[kind],
        record_format=record_format if kind == "documents" else RecordFormat(GROUP_FORMATS[kind], "all"),
        accept=None if kind == "documents" else partial(group_fault, kind=kind),
    )
    # The folder's files may be others than in an earlier call.
    loaded = _LOADED[tokenizer] = load_tokenizer(tokenizer)
    request = {
        "source": str(source),
        "tokenizer": loaded.fingerprint,
        "fields": dict(fields or {}),
        "language": language,
        "domain": domain,
        "unit": unit,
        "split": split,
        "format": [record_format.name, record_format.take],
        "shard_bytes": shard_bytes,
        "kind": kind,
        "revision": revision,
    }
    encoding = Encoding(tokenizer, kind, revision)
    with claim(out, overwrite=overwrite, reads=[tokenizer, Path(source)]) as claimed:
        work = claimed.beside("work")
        try:
            _prepare(work, request)
            count = _write_shards(work, reader, encoding, workers, shard_bytes)
            _write_manifest(work, loaded, count, encoding)
            clear_partials(work)
            claimed.publish(work)
        except (UserError, OSError):
            # The input is wrong or the disk is full, which would happen again: nothing is kept.
            shutil.rmtree(work, ignore_errors=True)
            raise
    return reader


def _prepare(work: Path, request: dict[str, Any]) -> None:
    """Create the work folder, or keep that of an interrupted run with the same request."""
    if os.path.lexists(work):
        marker = work / "request.json"
        if not marker.exists() or read_json(marker) != request:
            remove(work)
    if not work.exists():
        work.mkdir()
        write_json(work / "request.json", request)


@dataclass(frozen=True)
class Encoding:
    """How records become tokens: the folder of the tokenizer, and the arguments of `tokenize`."""

    tokenizer: Path
    kind: TokenKind
    revision: str | None

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a record that determine its tokens and its description."""
        own = ("text", "messages") if self.kind == "documents" else GROUP_FIELDS[self.kind]
        return (*own, "id", "language", "domain", "source")


def _chunks(reader: RecordReader, encoding: Encoding, shard_bytes: int) -> Iterator[tuple[list[Record], str]]:
    """Yield records in groups of about `shard_bytes` of text, each with a digest of its content."""
    chunk: list[Record] = []
    size = 0
    digest = blake2b(digest_size=16)
    for record in reader:
        slim: Record = {key: record[key] for key in encoding.fields if key in record}
        line = json.dumps(slim, ensure_ascii=False, sort_keys=True).encode("utf-8")
        digest.update(line)
        chunk.append(slim)
        size += len(line)
        if size >= shard_bytes:
            yield chunk, digest.hexdigest()
            chunk, size, digest = [], 0, blake2b(digest_size=16)
    if chunk:
        yield chunk, digest.hexdigest()


def _write_shards(
    work: Path, reader: RecordReader, encoding: Encoding, workers: int, shard_bytes: int
) -> int:
    """Write the missing shards; return the number of all shards."""
    pool: ProcessPoolExecutor | None = None
    pending: list[Future[None]] = []
    count = 0
    try:
        for number, (chunk, digest) in enumerate(_chunks(reader, encoding, shard_bytes)):
            count = number + 1
            if _is_written(work, number, digest):
                continue
            if workers == 1:
                _write_shard(work, number, chunk, digest, encoding)
                continue
            if pool is None:
                # A fork would copy the locks of the tokenizers library's threads in any state.
                context = multiprocessing.get_context("spawn")
                pool = ProcessPoolExecutor(
                    workers, mp_context=context, initializer=_end_with_parent, initargs=(os.getpid(),)
                )
            pending.append(pool.submit(_write_shard, work, number, chunk, digest, encoding))
            if len(pending) > workers:
                pending.pop(0).result()
        for future in pending:
            future.result()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return count


def _is_written(work: Path, number: int, digest: str) -> bool:
    """Return whether an interrupted run wrote this text's shard, and nothing changed since.

    Compares its record and its files.
    """
    try:
        about = read_json(work / f"shard-{number:05d}.json")
        return (
            about["digest"] == digest
            and about["sha256"] == digest_of(about)
            and all(
                (work / name).is_file() and sha256_file(work / name) == entry["sha256"]
                for name, entry in about["files"].items()
            )
        )
    except (UserError, AttributeError, KeyError, TypeError):
        # Missing or damaged: the shard is written again.
        return False


def _end_with_parent(parent: int) -> None:
    """End a worker when its parent ends.

    A worker waits on a pipe that it holds open itself, so it would outlive a killed parent.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_LOADED: dict[Path, Tokenizer] = {}


def _write_shard(work: Path, number: int, records: list[Record], digest: str, encoding: Encoding) -> None:
    """Tokenize one group of records; the shard's `.json` is written last and marks it as complete."""
    path = encoding.tokenizer
    if path not in _LOADED:
        _LOADED[path] = load_tokenizer(path)
    tokenizer = _LOADED[path]
    groups: list[EncodedGroup] = []
    masks: list[list[bool]] = []
    if encoding.kind != "documents":
        groups = [_encode(record, encoding.kind, tokenizer, encoding.revision) for record in records]
        documents, masks = [group.tokens for group in groups], [group.mask for group in groups]
    elif _are_chats(records):
        pairs = [tokenizer.encode_messages(record["messages"]) for record in records]
        documents, masks = [ids for ids, _ in pairs], [mask for _, mask in pairs]
    else:
        encoded = tokenizer.encode_batch([record["text"] for record in records])
        documents = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in encoded]
    chat = bool(masks)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    name = f"shard-{number:05d}"
    np.concatenate([np.asarray(ids, dtype=dtype) for ids in documents]).tofile(work / f"{name}.tokens")
    lengths = [len(ids) for ids in documents]
    np.cumsum([0, *lengths]).astype(np.uint64).tofile(work / f"{name}.offsets")
    if chat:
        np.concatenate([np.asarray(mask, dtype=np.uint8) for mask in masks]).tofile(work / f"{name}.mask")
    sizes = [_bytes(record) for record in records]
    _write_documents(work / f"{name}.documents.parquet", records, sizes, groups)
    languages: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    domains: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for record, length, size in zip(records, lengths, sizes, strict=True):
        for totals in (languages[record["language"]], domains[record["domain"]]):
            totals[0] += 1
            totals[1] += length
            totals[2] += size
    endings = (".tokens", ".offsets", ".documents.parquet", *([".mask"] if chat else []))
    # Only its own files: other processes write and rename theirs in the same folder.
    for ending in endings:
        fsync_file(work / (name + ending))
    fsync_directory(work)
    about = {
        "digest": digest,
        "chat": chat,
        "languages": languages,
        "domains": domains,
        "files": {
            name + ending: {
                "bytes": (work / (name + ending)).stat().st_size,
                "sha256": sha256_file(work / (name + ending)),
            }
            for ending in endings
        },
    }
    write_json(work / f"{name}.json", {**about, "sha256": digest_of(about)})


def _are_chats(records: list[Record]) -> bool:
    """Return whether all records are chats. Raises `UserError` for chats and texts together."""
    chat = "messages" in records[0]
    if any(("messages" in record) != chat for record in records):
        raise UserError(
            "holds both chats ('messages') and plain texts",
            where=str(records[0]["source"]),
            hint="tokenize them apart",
        )
    return chat


def _encode(record: Record, kind: GroupKind, tokenizer: Tokenizer, revision: str | None) -> EncodedGroup:
    try:
        return encode_group(record, kind, tokenizer, revision)
    except UserError as error:
        raise UserError(error.what, where=f"record {record['id']}", hint=error.hint) from None


def _bytes(record: Record) -> int:
    """Count the UTF-8 bytes of a record's text after NFC, which is what the tokenizer reads."""
    if "text" in record:
        texts = [record["text"]]
    else:
        answers = [record[name] for name in ("prompt", "messages", "chosen", "rejected") if name in record]
        answers += record.get("completions", [])
        texts = [message["content"] for messages in answers for message in messages]
    return sum(len(unicodedata.normalize("NFC", text).encode("utf-8")) for text in texts)


def _write_documents(path: Path, records: list[Record], sizes: list[int], groups: list[EncodedGroup]) -> None:
    """Write the table of documents; groups have their trees and values in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        name: pa.array([record[name] for record in records], pa.string())
        for name in ("id", "language", "domain", "source")
    }
    columns["bytes"] = pa.array(sizes, pa.int64())
    if groups:
        kinds = {"parent": pa.int32(), "length": pa.int32(), "completion": pa.bool_()}
        for name, kind in kinds.items():
            values = [[getattr(segment, name) for segment in group.segments] for group in groups]
            columns[f"segment_{name}"] = pa.array(values, pa.list_(kind))
        columns["probability"] = pa.array([group.probability for group in groups], pa.float64())
        columns["margin"] = pa.array([group.margin for group in groups], pa.float64())
        columns["labels"] = pa.array([group.labels for group in groups], pa.list_(pa.bool_()))
        columns["scores"] = pa.array([group.scores for group in groups], pa.list_(pa.float64()))
    table = pa.table(columns)
    # An open file, because pyarrow takes no path that is not UTF-8.
    with path.open("wb") as file:
        pq.write_table(table, file, compression="zstd")


def _write_manifest(work: Path, tokenizer: Tokenizer, count: int, encoding: Encoding) -> None:
    """Collect the shards' records into manifest.json, and remove the files for a restart."""
    shards = [work / f"shard-{number:05d}.json" for number in range(count)]
    # An interrupted run may have had more text; its further shards are removed.
    kept = {path.stem for path in shards}
    for path in work.glob("shard-*"):
        if path.name.split(".")[0] not in kept:
            path.unlink()
    about = [read_json(path) for path in shards]
    if len({item["chat"] for item in about}) > 1:
        raise UserError("holds both chats ('messages') and plain texts", hint="tokenize them apart")
    totals: dict[str, dict[str, dict[str, int]]] = {"languages": {}, "domains": {}}
    for item in about:
        for kind, by_name in totals.items():
            for name, (documents, tokens, size) in item[kind].items():
                entry = by_name.setdefault(name, {"documents": 0, "tokens": 0, "bytes": 0})
                entry["documents"] += documents
                entry["tokens"] += tokens
                entry["bytes"] += size
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        "chat": about[0]["chat"],
        **({} if encoding.kind == "documents" else {"kind": encoding.kind, "revision": encoding.revision}),
        "shards": [path.stem for path in shards],
        "documents": sum(entry["documents"] for entry in totals["languages"].values()),
        "tokens": sum(entry["tokens"] for entry in totals["languages"].values()),
        "bytes": sum(entry["bytes"] for entry in totals["languages"].values()),
        "languages": dict(sorted(totals["languages"].items())),
        "domains": dict(sorted(totals["domains"].items())),
        "files": {name: entry for item in about for name, entry in item["files"].items()},
    }
    write_json(work / "manifest.json", {**manifest, "sha256": digest_of(manifest)})
    for path in (*shards, work / "request.json"):
        path.unlink()
