"""Distinguish control tokens from others, and tokenize plain text without control tokens.

| an added token | in users' text |
|---|---|
| `special: true`, or named by the configuration (`eos_token`, ...) | text |
| `special: false`, written like a marker: `<tool_call>`, `[INST]`, `<|fim_prefix|>` | text as well |
| `special: false`, anything else: words, runs of spaces, HTML tags | a token, as in `transformers` |

The library leaves the first kind alone when `encode_special_tokens` is set, but only in its list of added
tokens. A Unigram, WordLevel or WordPiece model, or BPE with `ignore_merges`, still finds a marker in the
model's own vocabulary. Such text is split inside the marker and encoded again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from koine.errors import UserError, first_line
from koine.files import parse_json

_MARKER = re.compile(r"[\s▁]*(?:<[^<>]*\w[^<>]*>|\[[^\[\]]*\w[^\[\]]*\]|\{[^{}]*\w[^{}]*\})[\s▁]*")
# HTML tags, which some vocabularies (Gemma's) hold as words: people write them in text.
_HTML = re.compile(
    r"</?(?:a|abbr|article|b|blockquote|body|br|caption|code|dd|div|dl|dt|em|footer|h[1-6]|head|header|"
    r"hr|html|i|img|li|nav|ol|p|pre|section|small|span|strong|"
    r"sub|sup|table|tbody|td|tfoot|th|thead|title|tr|u|ul)/?>"
)
_WHOLE_WORD_MODELS = ("Unigram", "WordLevel", "WordPiece")
DAMAGED = "the file is damaged or of an unknown kind"
LONG_TEXT = 10_000
"""Characters from which the library's encoding without offsets is used; it is several times as fast."""


def looks_like_marker(token: str) -> bool:
    """Return whether a token is written like a marker (a name in brackets) and is no HTML tag."""
    return _MARKER.fullmatch(token) is not None and _HTML.fullmatch(token) is None


@contextmanager
def library_errors(where: str | Path, *, doing: str, hint: str) -> Iterator[None]:
    """Turn exceptions of the Rust libraries into a `UserError`.

    `tokenizers` raises bare `Exception`s. A panic of Rust is a `PanicException`, which is no `Exception`.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise UserError(f"{doing} ({first_line(error)})", where=where, hint=hint) from None
        raise


def open_backend(text: str, where: str | Path) -> Any:
    """Open a `tokenizer.json` without padding and truncation. Raises `UserError` if it is no tokenizer."""
    from tokenizers import Tokenizer as Backend

    with library_errors(where, doing="not a tokenizer", hint=DAMAGED):
        backend = Backend.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    return backend


def read_bytes(path: Path) -> bytes:
    """Read a file's bytes. Raises `UserError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot be read ({error.strerror or error})", where=path, hint="look at the file"
        ) from None


def read_text(path: Path) -> str:
    """Read a file's text. Raises `UserError` if it cannot be read or is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", where=path, hint="the file is damaged") from None


def parsed_object(text: str, what: str, where: str | Path) -> dict[str, Any]:
    """Parse a JSON object. Raises `UserError`, beginning with `what`, for anything else."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{what} ({first_line(error)})", where=where, hint=DAMAGED) from None
    if not isinstance(value, dict):
        raise UserError(f"{what} (no JSON object)", where=where, hint=DAMAGED)
    return value


class PlainText:
    """Encode text as plain text: no control token in it takes effect.

    Attributes:
        backend: the library's tokenizer; of the added tokens, it recognises only those that are no control
            tokens.
        hard: control tokens that are special or named by the configuration.
        soft: control tokens that only look like markers; the assistant may write them.
    """

    def __init__(
        self,
        text: str,
        *,
        named: Iterable[str] = (),
        where: str | Path = "the tokenizer",
    ) -> None:
        """Open a `tokenizer.json`, given as `text`; `named` are the tokens that the configuration names.

        Raises `UserError` where it is no tokenizer.
        """
        names = set(named)
        backend = open_backend(text, where)
        self.content = content = parsed_object(text, "not a tokenizer", where)
        """The file, parsed."""
        added = [(str(one["content"]), bool(one["special"])) for one in content.get("added_tokens") or []]
        self.hard = frozenset(token for token, special in added if special or token in names)
        self.soft = frozenset(token for token, _ in added if looks_like_marker(token)) - self.hard
        self._where = where
        meek = [token for token, special in added if not special and token in self.hard | self.soft]
        if meek:
            steering = [
                {**one, "special": bool(one["special"]) or one["content"] in meek}
                for one in content["added_tokens"]
            ]
            text = json.dumps({**content, "added_tokens": steering}, ensure_ascii=False)
            backend = open_backend(text, where)
        self._text = text
        self.backend = backend
        # Not part of tokenizer.json. Without this flag, `<BOS_TOKEN>` in a user's text would take effect.
        self.backend.encode_special_tokens = True
        self._leaks = self._found_by_model()
        self.normalised = self.backend.normalizer is not None and any(
            one.get("normalized") and one["content"] in self.hard | self.soft
            for one in content.get("added_tokens") or []
        )
        """Whether a marker is looked for in the text as normalised."""

    def encode(self, text: str) -> list[int]:
        """Encode one text to ids."""
        if len(text) > LONG_TEXT:
            return self.encode_batch([text])[0]
        with self._errors():
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        if self._leaks and not self._leaks.isdisjoint(ids):
            ids = self._careful.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts to ids, in parallel over the cores."""
        with self._errors():
            found = [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._leaks:
            for place, ids in enumerate(found):
                if not self._leaks.isdisjoint(ids):
                    found[place] = self._careful.encode(texts[place], add_special_tokens=False).ids
        return found

    def normalises_to_control(self, text: str) -> bool:
        """Return whether normalisation turns a part of the text into a control token."""
        if not self.normalised:
            return False
        normal = self.backend.normalizer.normalize_str(text)
        return any(token in normal for token in self.hard | self.soft)

    def copy(self) -> Any:
        """Open another library tokenizer that encodes as `backend` does."""
        backend = open_backend(self._text, self._where)
        backend.encode_special_tokens = True
        return backend

    def _errors(self) -> Any:
        return library_errors(
            self._where, doing="the tokenizer cannot read the text", hint="its vocabulary lacks what it names"
        )

    def _found_by_model(self) -> frozenset[int]:
        """Return ids of control tokens that the model itself can produce from text."""
        model = self.content.get("model") or {}
        ids = self.backend.get_vocab(with_added_tokens=False)
        inside = {token for token in self.hard | self.soft if token in ids}
        if model.get("type") not in _WHOLE_WORD_MODELS and not model.get("ignore_merges"):
            merges = model.get("merges") or []
            inside &= {"".join(one if isinstance(one, list) else one.split(" ")) for one in merges}
        unknown = model.get("unk_token")
        return frozenset(ids[token] for token in inside if token != unknown and len(token) > 1)

    @cached_property
    def _careful(self) -> Any:
        """Return the tokenizer with a cut after the first character of every marker."""
        from tokenizers import Regex, pre_tokenizers

        backend = self.copy()
        tokens = sorted(self.hard | self.soft, key=len, reverse=True)
        pattern = "|".join(
            f"{_escaped(token[0])}(?={_escaped(token[1:])})" for token in tokens if len(token) > 1
        )
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        own = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*own, cut])
        return backend


def _escaped(text: str) -> str:
    """Escape a text for a regular expression of Oniguruma."""
    return "".join(
        character if character.isalnum() or ord(character) > 127 else f"\\x{ord(character):02X}"
        for character in text
    )
