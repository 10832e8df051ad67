"""The layout of a corpus folder, written from the sample world or from the user's own text.

documents/CODE.jsonl            training documents, one file a language
documents-heldout/CODE.jsonl    documents that no step trains on, for bits per byte
questions/train/CODE.jsonl      chats for supervised fine-tuning
questions/test/CODE.jsonl       questions with exact answers (sample world only)
code.jsonl                      the code domain
roles.json                      {"primary": [...], "expanded": [...], "chat": [...]}: language codes
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from koine.data.records import TRANSLATED
from koine.errors import UserError
from koine.files import read_json, write_json
from koine.languages import language


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Roles of the languages, as in the universal-tokenizer study.

    `primary` languages are for pretraining, `expanded` ones for adaptation; `chat` ones have chats.
    """

    primary: tuple[str, ...]
    expanded: tuple[str, ...]
    chat: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return self.primary + self.expanded

    def save(self, corpus: Path) -> None:
        write_json(
            corpus / "roles.json",
            {"primary": self.primary, "expanded": self.expanded, "chat": self.chat},
        )


def load_roles(corpus: Path) -> Roles:
    """Return the roles of a corpus."""
    roles = read_json(corpus / "roles.json")
    return Roles(
        primary=tuple(roles["primary"]), expanded=tuple(roles["expanded"]), chat=tuple(roles["chat"])
    )


def split_roles(
    codes: Sequence[str], *, primary_cluster: str, primary_languages: Sequence[str] = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return primary and expanded languages: an explicit list or a cluster, and all others.

    Raises `UserError` where either side would be empty: the comparison needs both.
    """
    wanted = {language(code).code for code in primary_languages}
    primary = tuple(
        code for code in codes if (code in wanted if wanted else language(code).cluster == primary_cluster)
    )
    expanded = tuple(code for code in codes if code not in primary)
    if not primary:
        raise UserError(
            f"no primary language ({', '.join(sorted(wanted)) or primary_cluster}) is in the data",
            hint="name the pretraining languages with --set primary_languages=CODE,CODE",
        )
    if not expanded:
        raise UserError(
            "every language of the data is a primary one, so there is nothing to adapt to",
            hint="name fewer with --set primary_languages=CODE,CODE or add text in other languages",
        )
    return primary, expanded


def field_mapping(fields: tuple[str, ...]) -> dict[str, str]:
    """Return `("text=content", "language=lang")` as a dict; raises `UserError` for an entry without `=`."""
    mapping = {}
    for entry in fields:
        name, separator, column = entry.partition("=")
        if not separator or not name or not column:
            raise UserError(
                f"field mapping '{entry}' is not NAME=COLUMN",
                hint="for example fields=text=content,language=lang",
            )
        mapping[name] = column
    return mapping


def held_out(record: dict[str, Any], *, share: float) -> bool:
    """Return whether a record is held out: by its own `split` if it has one, else by a hash of its id."""
    split = record.get("split")
    if isinstance(split, str) and split:
        return split.lower() not in ("train", "training")
    return _hash_holds_out(record, share=share)


def _hash_holds_out(record: dict[str, Any], *, share: float) -> bool:
    digest = hashlib.blake2b(str(record["id"]).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@dataclass
class LanguageShare:
    """Counts of one language of the user's text."""

    documents: int = 0
    bytes: int = 0
    heldout_documents: int = 0
    heldout_bytes: int = 0
    chats: int = 0
    _files: dict[str, Any] = field(default_factory=dict, repr=False)


KEPT_FIELDS = ("id", "text", "messages", "language", "domain", "source", "split", TRANSLATED)
"""Fields of the user's records that are written to a corpus."""


def write_own_corpus(
    records: Iterable[dict[str, Any]],
    out: Path,
    *,
    max_bytes: int,
    heldout_bytes: int,
    heldout_share: float,
    min_bytes: int,
) -> dict[str, LanguageShare]:
    """Sort records into the corpus layout by language; return the languages kept, with their counts.

    At most `max_bytes` of training text and `heldout_bytes` of held-out text are taken of each language, in
    file order. Languages with less than `min_bytes` of training text are left out. If all records of a
    language are marked for training, some are held out all the same. Memory does not grow with the data.
    """
    shares: dict[str, LanguageShare] = defaultdict(LanguageShare)
    for folder in ("documents", "documents-heldout", "questions/train", "questions/test"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    try:
        for record in records:
            share = shares[record["language"]]
            kind = _place(record, share, max_bytes, heldout_bytes, heldout_share)
            if kind is None:
                continue
            file = share._files.get(kind)
            if file is None:
                path = out / kind / f"{record['language']}.jsonl"
                file = share._files[kind] = path.open("w", encoding="utf-8")
            # Other fields may hold values that JSON has no type for: dates, images, half a surrogate pair.
            kept = {name: entry for name, entry in record.items() if name in KEPT_FIELDS}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    finally:
        for share in shares.values():
            for file in share._files.values():
                file.close()
            share._files.clear()
    for code, share in shares.items():
        if share.documents > 1 and not share.heldout_documents:
            _hold_back(out, code, share, heldout_share, heldout_bytes)
    kept = {
        code: share
        for code, share in sorted(shares.items())
        if share.bytes >= min_bytes and share.heldout_documents > 0
    }
    for code in shares.keys() - kept.keys():
        for folder in ("documents", "documents-heldout"):
            (out / folder / f"{code}.jsonl").unlink(missing_ok=True)
    return kept


def _hold_back(out: Path, code: str, share: LanguageShare, heldout_share: float, heldout_bytes: int) -> None:
    """Move training documents of a language to its held-out ones: by a hash of the id, else the last."""
    path = out / "documents" / f"{code}.jsonl"
    # Split at line feeds only: str.splitlines also splits at U+0085 and U+2028, which text may hold.
    lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    records = [json.loads(line) for line in lines]
    chosen = [index for index, record in enumerate(records) if _hash_holds_out(record, share=heldout_share)]
    moved: list[int] = []
    for index in chosen or [len(lines) - 1]:
        if share.heldout_bytes >= heldout_bytes:
            break
        size = len(records[index]["text"].encode("utf-8"))
        share.documents, share.bytes = share.documents - 1, share.bytes - size
        share.heldout_documents, share.heldout_bytes = share.heldout_documents + 1, share.heldout_bytes + size
        moved.append(index)
    there = out / "documents-heldout" / f"{code}.jsonl"
    there.write_text("".join(lines[index] + "\n" for index in moved), encoding="utf-8")
    gone = set(moved)
    path.write_text(
        "".join(line + "\n" for index, line in enumerate(lines) if index not in gone), encoding="utf-8"
    )


def _place(
    record: dict[str, Any], share: LanguageShare, max_bytes: int, heldout_bytes: int, heldout_share: float
) -> str | None:
    heldout = held_out(record, share=heldout_share)
    if "messages" in record:
        if heldout:
            return None
        share.chats += 1
        return "questions/train"
    size = len(record["text"].encode("utf-8"))
    if heldout:
        if share.heldout_bytes >= heldout_bytes:
            return None
        share.heldout_documents += 1
        share.heldout_bytes += size
        return "documents-heldout"
    if share.bytes >= max_bytes:
        return None
    share.documents += 1
    share.bytes += size
    return "documents"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSON Lines file that a step wrote."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def existing(corpus: Path, folder: str, codes: Iterable[str]) -> dict[str, Path]:
    """Return the files of `folder` for those of `codes` that have one."""
    paths = {code: corpus / folder / f"{code}.jsonl" for code in codes}
    return {code: path for code, path in paths.items() if path.exists()}


def write_step_report(out: Path, title: str, blocks: list[dict[str, Any]]) -> None:
    """Write a step's part of the run's report."""
    write_json(out / "report.json", {"title": title, "blocks": blocks})
