"""Any tokenizer behind one small interface, so that tokenizers of different kinds can be measured on the same text.

| given | opened with |
|---|---|
| a folder with `tokenizer.json`, or that file | `tokenizers` |
| a folder of `transformers` without one | `AutoTokenizer` (extra `hf`) |
| `NAME.tiktoken` | `tiktoken` (extra `measure`) |
| `NAME.model` | `sentencepiece` (extra `measure`) |
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from koine.errors import UserError
from koine.extras import import_extra
from koine.tokenizer.streaming import byte_level_table

SPACE_MARK = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# How the published vocabularies cut text; a `.tiktoken` file holds the ranks alone.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TIKTOKEN_PATTERNS = {
    "o200k": "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    "cl100k": "|".join(
        (
            _CONTRACTIONS,
            r"[^\r\n\p{L}\p{N}]?\p{L}+",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    ),
    "50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class AnyTokenizer(Protocol):
    """What a measure needs of a tokenizer."""

    vocab_size: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that a token stands for; none for a special token."""
        ...


class _Backend:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, backend: Any) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        self._backend = backend
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self._tokens = {token_id: token for token, token_id in ids.items()}
        self._added = backend.get_added_tokens_decoder()
        parts = _parts(json.loads(backend.to_str()))
        self._characters = byte_level_table() if "ByteLevel" in parts else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return b"" if added.special else str(added.content).encode("utf-8")
        token = self._tokens.get(token_id)
        if token is None:
            return b""
        if self._characters is not None:
            if all(character in self._characters for character in token):
                return bytes(self._characters[character] for character in token)
            return str(token).encode("utf-8")
        return piece_bytes(str(token).removeprefix("##"))


class _Tiktoken:
    """A vocabulary of the `tiktoken` library."""

    def __init__(self, path: Path) -> None:
        tiktoken = import_extra("tiktoken", extra="measure", purpose="open a .tiktoken file")
        ranks = read_ranks(path)
        self._encoding = tiktoken.Encoding(
            name=path.stem,
            pat_str=tiktoken_pattern(path, len(ranks)),
            mergeable_ranks=ranks,
            special_tokens={},
        )
        self.vocab_size = max(ranks.values()) + 1
        self._tokens = {rank: token for token, rank in ranks.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._encoding.encode_ordinary_batch(list(texts))
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens.get(token_id, b"")


class _SentencePiece:
    """A model of the `sentencepiece` library."""

    def __init__(self, path: Path) -> None:
        library = import_extra("sentencepiece", extra="measure", purpose="open a SentencePiece model")
        try:
            self._processor = library.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"not a SentencePiece model ({str(error).splitlines()[0]})",
                where=path,
                mend="give another file",
            ) from None
        self.vocab_size = int(self._processor.get_piece_size())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=2)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return b""
        return piece_bytes(self._processor.id_to_piece(token_id))


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece-style token: `▁` is a space, `<0xE2>` a byte."""
    match = BYTE_TOKEN.fullmatch(piece)
    if match is not None:
        return bytes([int(match.group(1), 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8")


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a `.tiktoken` file: a line is a token in base64 and its rank.

    Raises `UserError` with the line that is not.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"line {number} is not a token in base64 and its rank",
                where=path,
                mend="give a file in tiktoken's format",
            ) from None
    if not ranks:
        raise UserError("holds no tokens", where=path, mend="give a file in tiktoken's format")
    return ranks


def tiktoken_pattern(path: Path, size: int) -> str:
    """The pattern of a published vocabulary, by the file's name (o200k, cl100k, 50k), else by its size."""
    for name, pattern in TIKTOKEN_PATTERNS.items():
        if name in path.name:
            return pattern
    if size <= 60_000:
        return TIKTOKEN_PATTERNS["50k"]
    return TIKTOKEN_PATTERNS["cl100k" if size <= 120_000 else "o200k"]


def _parts(value: dict[str, Any]) -> set[str]:
    """The kinds of the pre-tokenizers and decoders of a `tokenizer.json`."""
    found = set()
    waiting = [value.get("pre_tokenizer"), value.get("decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found.add(str(part.get("type")))
            waiting += [*part.get("pretokenizers", []), *part.get("decoders", [])]
    return found


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Open a tokenizer of any kind that the table at the top of this file names.

    Raises `UserError` where there is none, it is damaged, or the library that reads it is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            "no such file or folder",
            where=path,
            mend="give a tokenizer's folder, a .tiktoken file or a SentencePiece .model",
        )
    if path.is_file():
        if path.suffix == ".tiktoken":
            return _Tiktoken(path)
        if path.suffix == ".model":
            return _SentencePiece(path)
        if path.suffix == ".json":
            return _Backend(_read_backend(path))
        raise UserError(
            "no known kind of tokenizer",
            where=path,
            mend="known: a folder with tokenizer.json, NAME.json, NAME.tiktoken, NAME.model",
        )
    if (path / "tokenizer.json").is_file():
        return _Backend(_read_backend(path / "tokenizer.json"))
    models = [*path.glob("*.tiktoken"), *path.glob("tokenizer.model"), *path.glob("*.model")]
    if len(set(models)) == 1 and not (path / "tokenizer_config.json").exists():
        return open_tokenizer(models[0])
    transformers = import_extra("transformers", extra="hf", purpose="open a tokenizer without tokenizer.json")
    try:
        opened = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise UserError(
            f"transformers cannot open it as a tokenizer ({str(error).splitlines()[0]})",
            where=path,
            mend="give a folder that holds a tokenizer.json",
        ) from None
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "only opens as a tokenizer written in Python, which has no bytes for its tokens",
            where=path,
            mend="convert it to a tokenizer.json",
        )
    return _Backend(backend)


def _read_backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_file(str(path))
    except Exception as error:
        raise UserError(
            f"not a tokenizer ({error})", where=path, mend="the file is damaged or of an unknown kind"
        ) from error
