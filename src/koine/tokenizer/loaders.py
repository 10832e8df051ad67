"""Open tokenizers of any kind behind one interface, so that they can be measured on the same text.

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
import re
from collections.abc import Sequence
from pathlib import Path

from koine.errors import UserError, first_line
from koine.extras import import_extra
from koine.files import read_json
from koine.hub import TOKENIZER as TOKENIZER_FILES
from koine.hub import model_folder
from koine.tokenizer.control import PlainText, library_errors, read_bytes, read_text
from koine.tokenizer.token_bytes import SPACE_MARK, AnyTokenizer, TokenBytes, piece_bytes

# Pre-tokenization of the published vocabularies; a `.tiktoken` file holds only the ranks.
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


# Texts with a run of this many spaces are cut by another library.
LONG_SPACES = re.compile(r"(?<!\s)\s{50000,}")
LARGEST_RANK = 100_000_000
_LONGEST_RANK = 20
"""Digits of a rank that are read."""


class _FastTokenizer:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, text: str, where: Path) -> None:
        """Open a `tokenizer.json`, given as `text`."""
        self._plain = PlainText(text, where=where)
        ids = self._plain.backend.get_vocab(with_added_tokens=True)
        if not ids:
            raise UserError("a tokenizer without tokens", where=where, hint="give another")
        self.vocab_size = max(ids.values()) + 1
        self._token_bytes = TokenBytes(self._plain.backend, self._plain.content)
        self.unknown_id = self._token_bytes.unknown_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._plain.encode_batch(texts)

    def token_bytes(self, token_id: int) -> bytes:
        return self._token_bytes.token_bytes(token_id)

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        return self._token_bytes.unknown_bytes(texts)


class _Tiktoken:
    """A vocabulary of the `tiktoken` library; it holds all bytes."""

    unknown_id: int | None = None

    def __init__(self, path: Path) -> None:
        tiktoken = import_extra("tiktoken", extra="measure", purpose="open a .tiktoken file")
        ranks = read_ranks(path)
        self._where = path
        self._pattern = tiktoken_pattern(path, len(ranks))
        self._encoding = tiktoken.Encoding(
            name=path.stem, pat_str=self._pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self.vocab_size = max(ranks.values()) + 1
        self._tokens = {rank: token for token, rank in ranks.items()}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        long = {place for place, text in enumerate(texts) if LONG_SPACES.search(text)}
        short = [text for place, text in enumerate(texts) if place not in long]
        with library_errors(
            self._where, doing="tiktoken cannot read the text", hint="shorten its longest line"
        ):
            found = iter(self._encoding.encode_ordinary_batch(short))
            return [
                self._encode_long(text) if place in long else next(found) for place, text in enumerate(texts)
            ]

    def _encode_long(self, text: str) -> list[int]:
        """Encode to the same ids, with the text cut by another library.

        tiktoken's regular expressions overflow their stack in a long run of spaces.
        """
        from tokenizers import Regex, pre_tokenizers

        cut = pre_tokenizers.Split(Regex(self._pattern), behavior="isolated")
        ids: list[int] = []
        for _, (start, end) in cut.pre_tokenize_str(text):
            ids += self._encoding._encode_single_piece(text[start:end])
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens.get(token_id, b"")

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)


class _SentencePiece:
    """A model of the `sentencepiece` library."""

    def __init__(self, path: Path) -> None:
        library = import_extra("sentencepiece", extra="measure", purpose="open a SentencePiece model")
        try:
            self._processor = library.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"not a SentencePiece model ({first_line(error)})",
                where=path,
                hint="give another file",
            ) from None
        self.vocab_size = int(self._processor.get_piece_size())
        self.unknown_id: int | None = int(self._processor.unk_id())
        self._byte_tokens = any(map(self._processor.is_byte, range(self.vocab_size)))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=2)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return b""
        return piece_bytes(self._processor.id_to_piece(token_id), byte_tokens=self._byte_tokens)

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        if self._byte_tokens:
            return [0] * len(texts)
        # As strings, unknown pieces are the text itself.
        return [
            sum(
                len(piece.replace(SPACE_MARK, "").encode("utf-8"))
                for token, piece in zip(ids, pieces, strict=True)
                if token == self.unknown_id
            )
            for ids, pieces in zip(
                self.encode_batch(texts), self._processor.encode(list(texts), out_type=str), strict=True
            )
        ]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read the ranks of a `.tiktoken` file: each line is a token in base64 and its rank.

    Raises `UserError` with the line that is not.
    """
    ranks: dict[bytes, int] = {}
    hint = "give a file in tiktoken's format"
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, text = line.split()
            rank = int(text[:_LONGEST_RANK])
            ranks[base64.b64decode(token, validate=True)] = rank
        except (ValueError, binascii.Error):
            raise UserError(
                f"line {number} is not a token in base64 and its rank", where=path, hint=hint
            ) from None
        if not 0 <= rank < LARGEST_RANK:
            raise UserError(f"line {number} has the rank {rank}", where=path, hint=hint)
    if not ranks:
        raise UserError("holds no tokens", where=path, hint=hint)
    if len(set(ranks.values())) < len(ranks):
        raise UserError("two tokens have one rank", where=path, hint=hint)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"holds no token for the byte {missing[0]}", where=path, hint=hint)
    return ranks


def tiktoken_pattern(path: Path, size: int) -> str:
    """Return the pattern of a published vocabulary, by file name (o200k, cl100k, 50k), else by size."""
    for name, pattern in TIKTOKEN_PATTERNS.items():
        if name in path.name:
            return pattern
    if size <= 60_000:
        return TIKTOKEN_PATTERNS["50k"]
    return TIKTOKEN_PATTERNS["cl100k" if size <= 120_000 else "o200k"]


def open_tokenizer(path: str | Path) -> AnyTokenizer:
    """Open a tokenizer of any kind in the table at the top of this module.

    Raises `UserError` if there is none, it is damaged, or the library that reads it is not installed.
    """
    path = model_folder(path, TOKENIZER_FILES)
    if not path.exists():
        raise UserError(
            "no such file or folder",
            where=path,
            hint="give a tokenizer's folder, a .tiktoken file or a SentencePiece .model",
        )
    if path.is_file():
        if path.suffix == ".tiktoken":
            return _Tiktoken(path)
        if path.suffix == ".model":
            return _SentencePiece(path)
        if path.suffix == ".json":
            return _FastTokenizer(read_text(path), path)
        raise UserError(
            "no known kind of tokenizer",
            where=path,
            hint="known: a folder with tokenizer.json, NAME.json, NAME.tiktoken, NAME.model",
        )
    if (path / "tokenizer.json").is_file():
        return _FastTokenizer(read_text(path / "tokenizer.json"), path / "tokenizer.json")
    models = [*path.glob("*.tiktoken"), *path.glob("tokenizer.model"), *path.glob("*.model")]
    if len(set(models)) == 1 and not (path / "tokenizer_config.json").exists():
        return open_tokenizer(models[0])
    cannot = "transformers cannot open it as a tokenizer"
    hint = "give a folder that holds a tokenizer.json"
    transformers = import_extra("transformers", extra="hf", purpose="open a tokenizer without tokenizer.json")
    try:
        with library_errors(path, doing=cannot, hint=hint):
            opened = transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        _check_no_custom_code(path)
        raise UserError(f"{cannot} ({first_line(error)})", where=path, hint=hint) from None
    backend = getattr(opened, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "only opens as a tokenizer written in Python, which has no bytes for its tokens",
            where=path,
            hint="convert it to a tokenizer.json",
        )
    return _FastTokenizer(backend.to_str(), path)


def _check_no_custom_code(path: Path) -> None:
    """Raise `UserError` for a tokenizer with its own Python code, which is never run."""
    config = path / "tokenizer_config.json"
    about = read_json(config) if config.is_file() else {}
    own = about.get("auto_map") if isinstance(about, dict) else None
    named = own.get("AutoTokenizer") if isinstance(own, dict) else own
    if named:
        first = next((name for name in named if name), "") if isinstance(named, list) else named
        raise UserError(
            f"needs Python code that comes with it ({first}), which is never run",
            where=path,
            hint="give a folder that holds a tokenizer.json",
        )
