"""Bytes that the tokens of a `tokenizer.json` stand for, and the bytes of a text that no token stands for.

| vocabulary | a token |
|---|---|
| byte-level | one character a byte |
| SentencePiece-style (metaspace, byte fallback) | `▁` is a space, `<0xE2>` a byte |
| WordPiece, and BPE with marks | `##` inside a word and `</w>` at its end are marks, no text |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

from koine.tokenizer.streaming import byte_level_table

SPACE_MARK = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class AnyTokenizer(Protocol):
    """Interface that measures need of a tokenizer."""

    vocab_size: int

    @property
    def unknown_id(self) -> int | None:
        """Token for text that the vocabulary lacks; `None` if there is none."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text to ids, without special tokens."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of text that a token stands for; empty for a special token."""
        ...

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """Count the UTF-8 bytes of each text, without its spaces, that are read as unknown or dropped."""
        ...


class TokenBytes:
    """Bytes of the tokens of one `tokenizers.Tokenizer`.

    Attributes:
        lossless: whether every text has tokens, because the vocabulary holds all bytes.
        unknown_id: the model's token for unknown text, if it has one.
    """

    def __init__(self, backend: Any, content: Mapping[str, Any]) -> None:
        """content: the `tokenizer.json` of `backend`."""
        self._backend = backend
        ids: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self._tokens = {token_id: token for token, token_id in ids.items()}
        self._added = backend.get_added_tokens_decoder()
        self._special = {one["content"] for one in content.get("added_tokens") or [] if one["special"]}
        model = content.get("model") or {}
        parts = part_kinds(content)
        self._characters = byte_level_table() if "ByteLevel" in parts else None
        self._byte_tokens = bool(model.get("byte_fallback")) or "ByteFallback" in parts
        self._prefix = str(model.get("continuing_subword_prefix") or "")
        self._suffix = str(model.get("end_of_word_suffix") or "")
        whole = "<0x{:02X}>".format
        if self._characters is not None:
            self.lossless = all(character in ids for character in self._characters)
        else:
            self.lossless = self._byte_tokens and all(whole(byte) in ids for byte in range(256))
        unknown = model.get("unk_token")
        if model.get("type") == "Unigram":
            self.unknown_id: int | None = model.get("unk_id")
        else:
            self.unknown_id = ids.get(unknown) if isinstance(unknown, str) else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of text that a token stands for.

        Empty for a special token, the unknown token, and an id without a token.
        """
        token = self._tokens.get(token_id)
        if token is None or token_id == self.unknown_id:
            return b""
        added = self._added.get(token_id)
        if added is not None and added.content in self._special:
            return b""
        if self._characters is not None:
            if added is None:
                text = token.removesuffix(self._suffix) if self._suffix else token
                ended = b" " if text != token else b""
                if all(character in self._characters for character in text):
                    return bytes(self._characters[character] for character in text) + ended
            return str(added.content if added is not None else token).encode("utf-8")
        if self._prefix:
            token = token.removeprefix(self._prefix)
        if self._suffix and token.endswith(self._suffix):
            token = token.removesuffix(self._suffix) + " "
        return piece_bytes(token, byte_tokens=self._byte_tokens)

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """Count the UTF-8 bytes of each text, without its spaces, that are read as unknown or dropped."""
        if self.lossless:
            return [0] * len(texts)
        if self.unknown_id is None:
            return [self._dropped(text) for text in texts]
        found = []
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            known = bytearray(len(text))
            for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token_id != self.unknown_id:
                    known[start:end] = b"\1" * (end - start)
            lost = (
                character
                for character, one in zip(text, known, strict=True)
                if not one and not character.isspace()
            )
            found.append(sum(len(character.encode("utf-8")) for character in lost))
        return found

    def _dropped(self, text: str) -> int:
        """Count the bytes of a text that are dropped.

        The library drops what a vocabulary without an unknown token lacks, and shifts its offsets.
        """
        normalizer = self._backend.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        visible = (character for character in normal if not character.isspace())
        if self._characters is not None:
            character_of = {byte: character for character, byte in self._characters.items()}
            return sum(
                character_of[byte] not in self._alphabet for one in visible for byte in one.encode("utf-8")
            )
        return sum(len(one.encode("utf-8")) for one in visible if one not in self._alphabet)

    @cached_property
    def _alphabet(self) -> frozenset[str]:
        return frozenset(character for token in self._tokens.values() for character in token)


def piece_bytes(piece: str, *, byte_tokens: bool = True) -> bytes:
    """Return the bytes of a SentencePiece-style token: `▁` is a space.

    With `byte_tokens`, `<0xE2>` is a byte.
    """
    match = BYTE_TOKEN.fullmatch(piece) if byte_tokens else None
    if match is not None:
        return bytes([int(match.group(1), 16)])
    return piece.replace(SPACE_MARK, " ").encode("utf-8")


def part_kinds(content: Mapping[str, Any]) -> set[str]:
    """Return the types of the pre-tokenizers and decoders of a `tokenizer.json`."""
    found = set()
    waiting = [content.get("pre_tokenizer"), content.get("decoder")]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            found.add(str(part.get("type")))
            waiting += [*part.get("pretokenizers", []), *part.get("decoders", [])]
    return found


def scored_lengths(
    tokenizer: AnyTokenizer, texts: Sequence[str], encoded: Sequence[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Return the tokens of each text, and the unknown bytes among them, which count as a token each.

    As one token, unknown text would be the cheapest text of all, and the tokenizer that knows the least would
    win.
    """
    unknown = tokenizer.unknown_bytes(texts)
    lost = tokenizer.unknown_id
    lengths = [
        (len(ids) if lost is None else sum(token != lost for token in ids)) + size
        for ids, size in zip(encoded, unknown, strict=True)
    ]
    return lengths, unknown


def exact_ids(tokenizer: AnyTokenizer, text: str, ids: Sequence[int] | None = None) -> list[int] | None:
    """Return ids that stand for exactly the bytes of `text`; `None` if none are found.

    Also for tokenizers that begin every text with a space. ids: the tokenizer's encoding of the text, if it
    is known already.
    """
    data = text.encode("utf-8")

    def spelled(found: Sequence[int]) -> bytes:
        return b"".join(map(tokenizer.token_bytes, found))

    first = list(ids) if ids is not None else tokenizer.encode_batch([text])[0]
    if spelled(first) == data:
        return first
    if first and tokenizer.token_bytes(first[0]) == b" " and spelled(first[1:]) == data:
        return first[1:]
    if text.startswith(" ") and len(text) > 1:
        second = tokenizer.encode_batch([text[1:]])[0]
        if spelled(second) == data:
            return second
    return None
