"""Keep a JSON document from holding one key of an object twice, which no grammar can see.

Follows a document byte by byte, as far as objects, their keys and strings go; that it is JSON, the grammar
sees to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koine.tokenizer import Tokenizer

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPEN, _CLOSE = b"[{", b"]}"


class UniqueKeys:
    """The keys of the objects that are open at one place of a document."""

    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens
        self._state = _State()

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> UniqueKeys:
        """The beginning of a document in the tokens of `tokenizer`."""
        return cls(_tokens_of(tokenizer))

    def copy_empty(self) -> UniqueKeys:
        """The beginning of another document."""
        return UniqueKeys(self._tokens)

    def advance(self, token_id: int) -> None:
        """Take a token."""
        self._state.follow(self._tokens.texts[token_id])

    def mask_repeated(self, allowed: Tensor, matcher: Any) -> Tensor:
        """`allowed` ([vocab] bool) without the ids that end a key which its object holds already, or must come to one.

        matcher: the `llguidance.LLMatcher` at this place; it is copied, not changed.
        As it was where nothing else is allowed.
        """
        if not any(keys for keys in self._state.open):
            return allowed
        repeated = []
        known: dict[tuple[int, bytes], bool] = {}
        for token_id in self._candidates(allowed):
            state = self._state.copy()
            if state.follow(self._tokens.texts[token_id]):
                repeated.append(token_id)
            elif state.begins_used_key():
                after = matcher.deep_copy()
                if after.consume_token(token_id) and not self._has_way_out(state, after, known):
                    repeated.append(token_id)
        if not repeated or len(repeated) == int(allowed.sum()):
            return allowed
        kept = allowed.clone()
        kept[repeated] = False
        return kept

    def _candidates(self, allowed: Tensor) -> list[int]:
        """The allowed ids that may end a key, begin one, or go on as a key does that stands there already."""
        state = self._state
        signs = self._tokens.quoted if state.in_string else self._tokens.quoted | self._tokens.with_comma
        found = (allowed & signs).nonzero().flatten().tolist()
        if state.key is None or not state.begins_used_key():
            return found
        begun = len((_text_of(state.key) or "").encode("utf-8"))
        going_on: set[int] = set()
        for key in state.used_keys_begun():
            rest = key.encode("utf-8")[begun:]
            for length in range(1, len(rest) + 1):
                going_on.update(self._tokens.ids.get(rest[:length], ()))
        return found + [token_id for token_id in sorted(going_on) if allowed[token_id]]

    def _has_way_out(self, state: _State, matcher: Any, known: dict[tuple[int, bytes], bool]) -> bool:
        """Whether a key of which the object has some beginning can still become a new one.

        known: what was found out, by the depth of the object and the key's beginning.
        """
        if state.key is None:
            return self._finds_way_out(state, matcher, known)  # white space before the key: it soon ends
        place = len(state.open), state.key
        if place not in known:
            known[place] = self._finds_way_out(state, matcher, known)
        return known[place]

    def _finds_way_out(self, state: _State, matcher: Any, known: dict[tuple[int, bytes], bool]) -> bool:
        packed = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, count=len(self._tokens.texts), bitorder="little")
        waiting = []
        for token_id in np.flatnonzero(bits).tolist():
            after = state.copy()
            if after.follow(self._tokens.texts[token_id]):
                continue
            if not after.begins_used_key():
                return True
            waiting.append((token_id, after))
        for token_id, after in waiting:
            further = matcher.deep_copy()
            if further.consume_token(token_id) and self._has_way_out(after, further, known):
                return True
        return False


class _State:
    """open: for each open object its keys, for each open array None."""

    def __init__(self) -> None:
        self.open: list[frozenset[str] | None] = []
        self.in_string = False
        self.escaped = False
        self.key_next = False
        self.key: bytes | None = None

    def copy(self) -> _State:
        other = _State.__new__(_State)
        other.__dict__.update(self.__dict__)
        other.open = list(self.open)
        return other

    def begins_used_key(self) -> bool:
        """Whether a key comes now that may still become one of those which the object holds already."""
        return bool(self.used_keys_begun())

    def used_keys_begun(self) -> list[str]:
        """The keys of the object that begin as the one does that comes now."""
        keys = self.open[-1] if self.open else None
        if not keys or (self.key is None and not self.key_next):
            return []
        begun = _text_of(self.key or b"")
        return [] if begun is None else [key for key in keys if key.startswith(begun)]

    def follow(self, data: bytes) -> bool:
        """Read on; whether a key stood there twice."""
        repeated = False
        for byte in data:
            if self.in_string:
                ends = byte == _QUOTE and not self.escaped
                self.escaped = byte == _BACKSLASH and not self.escaped
                if not ends:
                    self.key = None if self.key is None else self.key + bytes((byte,))
                    continue
                self.in_string = False
                keys = self.open[-1] if self.open else None
                if self.key is not None and keys is not None:
                    key = str(json.loads(b'"' + self.key + b'"'))
                    repeated = repeated or key in keys
                    self.open[-1] = keys | {key}
                self.key = None
            elif byte == _QUOTE:
                self.in_string = True
                self.key = b"" if self.key_next else None
                self.key_next = False
            elif byte in _OPEN:
                self.open.append(frozenset() if byte == _OPEN[1] else None)
                self.key_next = byte == _OPEN[1]
            elif byte in _CLOSE:
                self.open.pop()
                self.key_next = False
            elif byte == _COMMA:
                self.key_next = self.open[-1] is not None
        return repeated


def _text_of(key: bytes) -> str | None:
    """The text of a key's beginning; None where it ends inside a character or an escape."""
    try:
        return str(json.loads(b'"' + key + b'"'))
    except ValueError:
        return None


@dataclass(frozen=True)
class _Tokens:
    """A vocabulary: the bytes of each id, the ids by their bytes, and [vocab] bool on those with a quotation mark or a comma."""

    texts: Sequence[bytes]
    ids: Mapping[bytes, list[int]]
    quoted: Tensor
    with_comma: Tensor


@lru_cache(maxsize=2)
def _tokens_of(tokenizer: Tokenizer) -> _Tokens:
    texts = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    ids: dict[bytes, list[int]] = {}
    for token_id, text in enumerate(texts):
        ids.setdefault(text, []).append(token_id)
    return _Tokens(
        texts,
        ids,
        torch.tensor([b'"' in text for text in texts]),
        torch.tensor([b"," in text for text in texts]),
    )
