"""Keep the keys of a JSON object unique, which no grammar can express.

Follows a document byte by byte, as far as objects, their keys and strings. The grammar ensures that it is
JSON.
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
    """The keys of the objects that are open at one point of a document."""

    def __init__(self, tokens: _Tokens) -> None:
        self._tokens = tokens
        self._state = _State()

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> UniqueKeys:
        """Return the state at the start of a document, for the tokens of `tokenizer`."""
        return cls(_tokens_of(tokenizer))

    def copy_empty(self) -> UniqueKeys:
        """Return the state at the start of another document."""
        return UniqueKeys(self._tokens)

    def advance(self, token_id: int) -> None:
        """Take a token."""
        self._state.follow(self._tokens.texts[token_id])

    def mask_repeated(self, allowed: Tensor, matcher: Any) -> Tensor:
        """Return `allowed` (`[vocab]` bool) without tokens that repeat a key, or lead only to repeated keys.

        Unchanged where no other token is allowed. matcher: the `llguidance.LLMatcher` here; copied, not
        changed.
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
        """Return the allowed ids that may end a key, start one, or continue like a used key."""
        state = self._state
        special = self._tokens.quoted if state.in_string else self._tokens.quoted | self._tokens.with_comma
        found = (allowed & special).nonzero().flatten().tolist()
        if state.key is None or not state.begins_used_key():
            return found
        begun = len((_text_of(state.key) or "").encode("utf-8"))
        continuing: set[int] = set()
        for key in state.used_keys_begun():
            rest = key.encode("utf-8")[begun:]
            for length in range(1, len(rest) + 1):
                continuing.update(self._tokens.ids.get(rest[:length], ()))
        return found + [token_id for token_id in sorted(continuing) if allowed[token_id]]

    def _has_way_out(self, state: _State, matcher: Any, known: dict[tuple[int, bytes], bool]) -> bool:
        """Return whether a key that starts like a used one can still become a new key.

        known: earlier results, by the object's depth and the start of the key.
        """
        if state.key is None:
            return self._finds_way_out(state, matcher, known)  # white space before the key: this soon ends
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
    """Position in a document. open: the keys of each open object, None for each open array."""

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
        """Return whether the current key may still become one that the object has."""
        return bool(self.used_keys_begun())

    def used_keys_begun(self) -> list[str]:
        """Return the object's keys that start like the current key."""
        keys = self.open[-1] if self.open else None
        if not keys or (self.key is None and not self.key_next):
            return []
        begun = _text_of(self.key or b"")
        return [] if begun is None else [key for key in keys if key.startswith(begun)]

    def follow(self, data: bytes) -> bool:
        """Take bytes of the document; return whether they repeat a key."""
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
    """Return the text of the start of a key, or None where it ends inside a character or an escape."""
    try:
        return str(json.loads(b'"' + key + b'"'))
    except ValueError:
        return None


@dataclass(frozen=True)
class _Tokens:
    """A vocabulary.

    texts: the bytes of each id. ids: ids by their bytes. quoted, with_comma: `[vocab]` bool, the tokens
    with a quotation mark, and those with a comma.
    """

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
