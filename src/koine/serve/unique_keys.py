"""Keep a JSON document from holding one key of an object twice, which no grammar can see.

Follows a document byte by byte, as far as objects, their keys and strings go; that it is JSON, the grammar
sees to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from koine.tokenizer import Tokenizer

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
_OPEN, _CLOSE = b"[{", b"]}"


class UniqueKeys:
    """The keys of the objects that are open at one place of a document."""

    def __init__(self, tokens: Sequence[bytes], quoted: Tensor) -> None:
        """Start at the beginning of a document.

        tokens: the bytes of each id. quoted: [vocab] bool, on the ids whose bytes hold a quotation mark.
        """
        self._tokens = tokens
        self._quoted = quoted
        self._state = _State()

    @classmethod
    def over(cls, tokenizer: Tokenizer) -> UniqueKeys:
        """The beginning of a document in the tokens of `tokenizer`."""
        return cls(*_tokens_of(tokenizer))

    def fresh(self) -> UniqueKeys:
        """The beginning of another document."""
        return UniqueKeys(self._tokens, self._quoted)

    def advance(self, token_id: int) -> None:
        """Take a token."""
        self._state.follow(self._tokens[token_id])

    def without_repeated(self, allowed: Tensor) -> Tensor:
        """`allowed` ([vocab] bool) without the ids that would end a key which its object holds already.

        As it was where nothing else is allowed.
        """
        if not any(keys for keys in self._state.open):
            return allowed
        repeated = [
            token_id
            for token_id in (allowed & self._quoted).nonzero().flatten().tolist()
            if self._state.copy().follow(self._tokens[token_id])
        ]
        if not repeated or len(repeated) == int(allowed.sum()):
            return allowed
        kept = allowed.clone()
        kept[repeated] = False
        return kept


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


@lru_cache(maxsize=2)
def _tokens_of(tokenizer: Tokenizer) -> tuple[list[bytes], Tensor]:
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    return tokens, torch.tensor([b'"' in text for text in tokens])
