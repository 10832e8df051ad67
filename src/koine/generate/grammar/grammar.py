"""Which tokens may come next, so that an answer is a JSON document of a given schema (library: `llguidance`).

The grammar works on bytes: it knows of each token the bytes that it stands for, and allows a token where the text so
far and these bytes can still become a whole document. Where the grammar leaves only one text, the library allows only
the tokens into which the tokenizer would cut it, as the model has seen it in training.
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

# Left to itself a model may write white space for ever; these are the separators of `json.dumps`.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammar:
    """A compiled grammar over one tokenizer's vocabulary; `start` gives the state of one answer.

    Compile once, start as often as there are answers: compiling takes milliseconds to a second, starting microseconds.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, end_ids: frozenset[int], keys: UniqueKeys | None = None
    ) -> None:
        """Start at the beginning of a document.

        matcher: an `llguidance.LLMatcher` that has read nothing yet. keys: of documents whose keys may
        repeat.
        """
        self._matcher = matcher
        self._keys = keys
        self.vocab_size = vocab_size
        self.end_ids = end_ids

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any], tokenizer: Tokenizer) -> Grammar:
        """Documents of `schema`, objects with their keys in the schema's order, spaced as `json.dumps` does.

        Raises `UserError` for a schema that is malformed, that nothing satisfies, or that cannot be enforced
        to the letter token by token; for a tokenizer that is not byte-level; and without the extra `grammar`.
        """
        held, free_keys = to_supported_schema(schema)
        text = schema_text(held)
        return cls._compile(
            lambda library: library.LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT),
            tokenizer,
            kind="the JSON schema",
            keys=UniqueKeys.for_tokenizer(tokenizer) if free_keys else None,
        )

    @classmethod
    def from_regex(cls, pattern: str, tokenizer: Tokenizer) -> Grammar:
        """Texts that match `pattern` as a whole (the syntax of Rust's `regex`). Raises as `from_json_schema` does."""
        return cls._compile(
            lambda library: library.LLMatcher.grammar_from_regex(pattern),
            tokenizer,
            kind="the regular expression",
        )

    @classmethod
    def from_lark(cls, text: str, tokenizer: Tokenizer) -> Grammar:
        """Texts that the Lark grammar's rule `start` derives. Raises as `from_json_schema` does."""
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
        library: Any = import_extra("llguidance", extra="grammar", purpose="constrain an answer to a grammar")
        if not tokenizer.lossless:
            raise UserError(
                "constrained answers need a vocabulary that holds all bytes, and this tokenizer's does not",
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
        # Some that nothing satisfies are found out only when the first token is asked for.
        first = grammar.start()
        try:
            possible = bool(first.mask().any())
        except UserError:
            possible = False
        if not possible:
            raise UserError(f"{kind} cannot be used (nothing satisfies it)", hint="fix or simplify it")
        return grammar

    def start(self) -> GrammarState:
        """The state of a new answer."""
        keys = None if self._keys is None else self._keys.copy_empty()
        return GrammarState(self._matcher.deep_copy(), self.vocab_size, self.end_ids, keys)


class GrammarState:
    """How far one answer has come in its grammar."""

    def __init__(
        self, matcher: Any, vocab_size: int, end_ids: frozenset[int], keys: UniqueKeys | None = None
    ) -> None:
        self._matcher = matcher
        self._keys = keys
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._allowed: Tensor | None = None
        self.finished = False
        """Whether the token that ends the answer has been taken."""

    @property
    def complete(self) -> bool:
        """Whether the text so far is a whole document; more of it may still be allowed (`1` may become `12`)."""
        return bool(self._matcher.is_accepting())

    def mask(self) -> Tensor:
        """[vocab] bool, on the CPU: True on the tokens that may come next.

        A token that ends an answer is allowed exactly where the text is `complete`; other special tokens never are.
        After the end only the end is allowed, so that a row of a batch may go on idle.
        Raises `UserError` where the grammar has become too complex to go on.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(packed, count=self._vocab_size, bitorder="little")
        self._allowed = torch.from_numpy(bits.view(np.bool_))
        if self._keys is None:
            return self._allowed
        return self._keys.mask_repeated(self._allowed, self._matcher)

    def advance(self, token_id: int) -> None:
        """Take `token_id`, which the mask must allow (`ValueError` otherwise; the state is of no use
        afterwards).

        Raises `UserError` where the grammar has become too complex to go on.
        """
        if self.finished:
            if token_id not in self._end_ids:
                raise ValueError(f"token {token_id} after the end of the answer")
            return
        allowed, self._allowed = self._allowed, None
        if not self._matcher.consume_token(token_id):
            # The library refuses a token that it has allowed where it comes to a limit of its own.
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
    """A tokenizer as `llguidance` reads one: the bytes of each id, and which ids are special."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.end_of_turn_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens: Sequence[bytes] = [
            tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)
        ]
        # An id that stands for no text is special, or a hole in the vocabulary.
        self.special_token_ids = [token_id for token_id, text in enumerate(self.tokens) if not text]
        self._tokenizer = tokenizer
        self._single = {text[0]: token_id for token_id, text in enumerate(self.tokens) if len(text) == 1}

    def __call__(self, text: str) -> list[int]:
        """How a text that the grammar forces is cut into tokens."""
        ids = exact_ids(self._tokenizer, text)
        if ids is not None:
            return ids
        # The normaliser has changed the text (a schema may hold any form of a letter); its bytes are asked for.
        data = text.encode("utf-8")
        return [self._single[byte] for byte in data]


@lru_cache(maxsize=2)
def _library_tokenizer(tokenizer: Tokenizer) -> Any:
    """The vocabulary as the library holds it; building it takes longest, and it serves every grammar."""
    import llguidance

    return llguidance.LLTokenizer(
        _Vocabulary(tokenizer), n_vocab=tokenizer.vocab_size, eos_token=sorted(_end_ids(tokenizer))
    )


def _end_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset({tokenizer.end_of_turn_id, tokenizer.eos_id})


def _first_part(message: str) -> str:
    """The library's message without the dump of its state."""
    return message.partition("<state>")[0].strip()
