"""Constrain generation to a JSON schema, a regular expression or a Lark grammar (library: `llguidance`).

The grammar works on bytes. It allows a token where the text so far and the token's bytes can still become a
complete document. Where only one text is possible, the library allows only the tokens that the tokenizer
would give for it, as the model has seen it in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koine.errors import UserError
from koine.extras import import_extra
from koine.generate.grammar.schema import schema_text
from koine.generate.grammar.supported_schema import to_supported_schema
from koine.generate.grammar.unique_keys import UniqueKeys
from koine.tokenizer import Tokenizer
from koine.tokenizer.token_bytes import exact_ids

# An unconstrained model may write white space for ever; these are the separators of `json.dumps`.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A compiled grammar over one tokenizer's vocabulary.

    Compile once, and call `start` for each completion: compiling takes milliseconds to a second, starting
    microseconds.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, end_ids: frozenset[int], keys: UniqueKeys | None = None
    ) -> None:
        """Use `from_json_schema`, `from_regex` or `from_lark`.

        matcher: an `llguidance.LLMatcher` at the start of a document. keys: keeps object keys
        unique, where the grammar cannot.
        """
        self._matcher = matcher
        self._keys = keys
        self.vocab_size = vocab_size
        self.end_ids = end_ids

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any], tokenizer: Tokenizer) -> Grammar:
        """Compile a JSON schema: keys in the schema's order, spaced as `json.dumps` does.

        Raises `UserError` for a schema that is malformed, that nothing satisfies, or that cannot be enforced
        exactly token by token; for a tokenizer that is not byte-level; and without the extra `grammar`.
        """
        supported, free_keys = to_supported_schema(schema)
        text = schema_text(supported)
        return cls._compile(
            lambda library: library.LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT),
            tokenizer,
            kind="the JSON schema",
            keys=UniqueKeys.for_tokenizer(tokenizer) if free_keys else None,
        )

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: Tokenizer) -> Grammar:
        """Compile a regular expression (syntax of Rust's `regex`) that the whole text matches.

        Raises as `from_json_schema` does.
        """
        return cls._compile(
            lambda library: library.LLMatcher.grammar_from_regex(pattern),
            tokenizer,
            kind="the regular expression",
        )

    @classmethod
    def from_lark(cls, text: str, tokenizer: Tokenizer) -> Grammar:
        """Compile a Lark grammar with the rule `start`. Raises as `from_json_schema` does."""
        return cls._compile(
            lambda library: library.LLMatcher.grammar_from_lark(text), tokenizer, kind="the grammar"
        )

    @classmethod
    def _compile(
        cls,
        source: Callable[[Any], str],
        tokenizer: Tokenizer,
        *,
        kind: str,
        keys: UniqueKeys | None = None,
    ) -> Grammar:
        library: Any = import_extra(
            "llguidance", extra="grammar", purpose="constrain generation to a grammar"
        )
        if not tokenizer.lossless:
            raise UserError(
                "constrained generation needs a vocabulary that holds all bytes, "
                "and this tokenizer's does not",
                hint="use a model with a byte-level or byte-fallback tokenizer",
            )
        try:
            text = source(library)
        except ValueError as error:
            raise UserError(f"{kind} cannot be used ({error})", hint="fix or simplify it") from None
        matcher = library.LLMatcher(_library_tokenizer(tokenizer), text, log_level=0)
        if matcher.is_error():
            raise UserError(
                f"{kind} cannot be used ({_first_part(matcher.get_error())})", hint="fix or simplify it"
            )
        grammar = cls(matcher, tokenizer.vocab_size, _end_ids(tokenizer), keys)
        # Some unsatisfiable grammars fail only when the first mask is computed.
        first = grammar.start()
        try:
            possible = bool(first.mask().any())
        except UserError:
            possible = False
        if not possible:
            raise UserError(f"{kind} cannot be used (nothing satisfies it)", hint="fix or simplify it")
        return grammar

    def start(self) -> GrammarState:
        """Return the state of a new completion."""
        keys = None if self._keys is None else self._keys.copy_empty()
        return GrammarState(self._matcher.deep_copy(), self.vocab_size, self.end_ids, keys)


class GrammarState:
    """Grammar state of one completion."""

    def __init__(
        self, matcher: Any, vocab_size: int, end_ids: frozenset[int], keys: UniqueKeys | None = None
    ) -> None:
        self._matcher = matcher
        self._keys = keys
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._allowed: Tensor | None = None
        self.finished = False
        """Whether the token that ends the completion has been taken."""

    @property
    def complete(self) -> bool:
        """Whether the text so far is a complete document; more may still be allowed (`1` may become `12`)."""
        return bool(self._matcher.is_accepting())

    def mask(self) -> Tensor:
        """Return `[vocab]` bool on the CPU, True on tokens that may come next.

        An end token is allowed exactly where the text is `complete`; other special tokens never are. After
        the end only end tokens are allowed, so that a row of a batch may idle.
        Raises `UserError` where the grammar becomes too complex.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        self._allowed = torch.from_numpy(bits.view(np.bool_))
        if self._keys is None:
            return self._allowed
        return self._keys.mask_repeated(self._allowed, self._matcher)

    def advance(self, token_id: int) -> None:
        """Take a token.

        Raises `ValueError` for a token that the mask forbids, after which the state cannot be used, and
        `UserError` where the grammar becomes too complex.
        """
        if self.finished:
            if token_id not in self._end_ids:
                raise ValueError(f"token {token_id} after the end of the document")
            return
        allowed, self._allowed = self._allowed, None
        if not self._matcher.consume_token(token_id):
            # At a limit of its own the library refuses a token that it has allowed.
            self._check(None if allowed is not None and bool(allowed[token_id]) else token_id)
        self.finished = token_id in self._end_ids
        if self._keys is not None and not self.finished:
            self._keys.advance(token_id)

    def _check(self, token_id: int | None = None) -> None:
        if not self._matcher.is_error():
            return
        problem = _first_part(self._matcher.get_error())
        if token_id is not None and self._matcher.stop_reason() not in (
            "ParserTooComplex",
            "LexerTooComplex",
        ):
            raise ValueError(f"the grammar does not allow token {token_id} here ({problem})")
        raise UserError(f"the grammar is too complex ({problem})", hint="simplify the schema")


class _Vocabulary:
    """A tokenizer as `llguidance` takes one: the bytes of each id, and the special ids."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_of_turn_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens: Sequence[bytes] = [
            tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)
        ]
        # An id without bytes is special, or a gap in the vocabulary.
        self.special_token_ids = [token_id for token_id, text in enumerate(self.tokens) if not text]
        self._tokenizer = tokenizer
        self._single = {text[0]: token_id for token_id, text in enumerate(self.tokens) if len(text) == 1}

    def __call__(self, text: str) -> list[int]:
        """Tokenize a text that is the only one the grammar allows."""
        ids = exact_ids(self._tokenizer, text)
        if ids is not None:
            return ids
        # The normaliser changed the text (a schema may hold any form of a letter): use single bytes.
        data = text.encode("utf-8")
        return [self._single[byte] for byte in data]


@lru_cache(maxsize=2)
def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the library's vocabulary. Building it is slow, so it is cached for all grammars."""
    import llguidance

    return llguidance.LLTokenizer(
        _Vocabulary(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=sorted(_end_ids(tokenizer))
    )


def _end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset({tokenizer.end_of_turn_id, tokenizer.eos_id})


def _first_part(message: str) -> str:
    """Return the library's message without the dump of its state."""
    return message.partition("<state>")[0].strip()
