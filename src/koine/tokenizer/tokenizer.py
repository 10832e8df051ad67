"""Read and write tokenizer folders: `tokenizer.json` and its companions, as `transformers` has them."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import disk_errors, write_atomically
from koine.hub import TOKENIZER as TOKENIZER_FILES
from koine.hub import model_folder
from koine.tokenizer.chat import CHAT_TEMPLATE, ROLE_TOKENS, Message, check_messages
from koine.tokenizer.control import PlainText, open_backend, parsed_object, read_text
from koine.tokenizer.markers import Hidden, MarkerEncoder
from koine.tokenizer.special import (
    BOS,
    CHATBOT,
    CLS,
    END_OF_TURN,
    MASK,
    PAD,
    SEP,
    SPECIAL_TOKENS,
    START_OF_TURN,
    UNK,
)
from koine.tokenizer.streaming import StreamDecoder, WindowStreamDecoder
from koine.tokenizer.template import completion_spans
from koine.tokenizer.token_bytes import TokenBytes

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TRAINING = "tokenizer_training.json"
"""Record of the training: weights, sample, seed."""


class Tokenizer:
    """Encode text and decode ids. `encode` reads any text as plain text.

    Attributes:
        vocab_size: number of ids, special tokens included (one more than the largest id).
        bos_id, eos_id, pad_id: begin and end of a document, padding. A tokenizer without BOS or padding uses
            its EOS.
        end_of_turn_id: the token that ends an assistant's message.
        fingerprint: sha256 of `tokenizer.json`.
        chat_template: Jinja text, or None.
    """

    def __init__(self, files: Mapping[str, str], *, where: str | Path = "the tokenizer") -> None:
        """files: the folder's texts by file name; only `tokenizer.json` is required."""
        self._files = dict(files)
        self._where = str(where)
        named = self._named_tokens()
        self._plain = PlainText(self._files[TOKENIZER], named=named.values(), where=where)
        self._content = self._plain.content
        self._backend = self._plain.backend
        self.fingerprint = hashlib.sha256(self._files[TOKENIZER].encode("utf-8")).hexdigest()
        self._ids: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        if not self._ids:
            raise UserError("a tokenizer without tokens", where=where, hint="give another")
        self.vocab_size = max(self._ids.values()) + 1
        special = {one["content"] for one in self._content.get("added_tokens") or [] if one["special"]}
        self._special_ids = frozenset(self._ids[token] for token in special if token in self._ids)
        self.chat_template = _template_in(self._files, self._where)
        self._template_tokens = named
        eos = named.get("eos_token")
        if eos is None:
            raise UserError(
                "no end-of-document token is named", where=where, hint=f'add "eos_token" to {CONFIG}'
            )
        self.eos_id = self._id_of(eos)
        self.bos_id = self._id_of(named.get("bos_token", eos))
        self.pad_id = self._id_of(named.get("pad_token", eos))
        self.end_of_turn_id = self._find_end_of_turn()

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """Encode plain text: no special token is added or recognised (see `koine.tokenizer.control`)."""
        try:
            return self._plain.encode(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise self._not_text([text], error) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode each text, in parallel over the cores; the result does not depend on their number."""
        try:
            return self._plain.encode_batch(texts)
        except (TypeError, UnicodeEncodeError) as error:
            raise self._not_text(texts, error) from None

    def encode_document(self, text: str) -> list[int]:
        """Return `[bos] + ids + [eos]`."""
        return [self.bos_id, *self.encode(text), self.eos_id]

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text for a model to continue: plain text after the tokens that the tokenizer begins with.

        These are what `transformers` puts before a text: BOS, or nothing. Control tokens in the text are read
        as text. An empty text without such a token begins with BOS.
        """
        return [*self._first_ids, *self.encode(text)] or [self.bos_id]

    def encode_messages(
        self, messages: Sequence[Message], *, generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Return ids of a conversation, and True for the assistant's tokens, its end-of-turn token included.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": str}`.
            generation_prompt: whether to end with the marker after which the assistant answers.

        Raises:
            UserError: the messages are malformed, or the tokenizer has no chat template.
        """
        turns = check_messages(messages)
        if self.chat_template is None:
            raise UserError("no chat template", where=self._where, hint=f"add a {TEMPLATE} to the folder")
        if self.chat_template != CHAT_TEMPLATE or not self._has_turn_tokens:
            return self._encode_template(messages, generation_prompt=generation_prompt)
        start, end = self._ids[START_OF_TURN], self._ids[END_OF_TURN]
        ids, completion = [self.bos_id], [False]
        for (role, _), content in zip(turns, self.encode_batch([text for _, text in turns]), strict=True):
            ids += [start, self._ids[ROLE_TOKENS[role]], *content, end]
            completion += [False, False] + [role == "assistant"] * (len(content) + 1)
        if generation_prompt:
            ids += [start, self._ids[CHATBOT]]
            completion += [False, False]
        return ids, completion

    # --- ids to text ---

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Decode ids to text; bytes that are no valid UTF-8 become U+FFFD."""
        text: str = self._parsing_backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream_decoder(self) -> StreamDecoder | WindowStreamDecoder:
        """Return a decoder whose `push(id)` returns text that is final, and `flush()` the rest.

        Special tokens give no text.
        """
        if self._byte_level:
            return StreamDecoder(self.token_bytes)
        return WindowStreamDecoder(self.decode)

    def vocabulary(self) -> dict[str, int]:
        """Return token -> id, tokens as `tokenizer.json` writes them."""
        return dict(self._ids)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids, in the order of the ids."""
        found = {token: token_id for token, token_id in self._ids.items() if token_id in self._special_ids}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of text that a token stands for; empty for a special token.

        A SentencePiece-style tokenizer that begins every text with a space has this space in its tokens'
        bytes too.
        """
        return self._token_bytes.token_bytes(token_id)

    @property
    def lossless(self) -> bool:
        """Whether every text has tokens, because the vocabulary holds all bytes."""
        return self._token_bytes.lossless

    @property
    def unknown_id(self) -> int | None:
        """Token for text that the vocabulary lacks; `None` if there is none, as in ours."""
        return self._token_bytes.unknown_id

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        """Count the UTF-8 bytes of each text, without its spaces, that are read as unknown or dropped."""
        return self._token_bytes.unknown_bytes(texts)

    # --- files ---

    def save(self, path: Path) -> None:
        """Write the tokenizer's files into the folder `path` (made if needed); other files there are kept."""
        path = Path(path)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        for name, text in self._files.items():
            write_atomically(path / name, text)

    # --- inside ---

    @property
    def _has_turn_tokens(self) -> bool:
        return all(token in self._ids for token in (START_OF_TURN, END_OF_TURN, *ROLE_TOKENS.values()))

    @cached_property
    def _first_ids(self) -> list[int]:
        """The special tokens that the post-processor puts before a text."""
        encoding = self._parsing_backend.encode("a")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [token for token, _ in takewhile(lambda pair: pair[1] == 1, pairs)]

    @cached_property
    def _byte_level(self) -> bool:
        decoder = self._content.get("decoder")
        return isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._backend, self._content)

    @cached_property
    def _parsing_backend(self) -> Any:
        """Return a tokenizer of the same vocabulary that recognises every added token.

        Used to decode, and for text that a template wrote.
        """
        return open_backend(self._files[TOKENIZER], self._where)

    @cached_property
    def _marker_encoder(self) -> MarkerEncoder:
        control = sorted(self._plain.hard | self._plain.soft)
        return MarkerEncoder(self._plain, {token: self._ids[token] for token in control})

    def _encode_template(
        self, messages: Sequence[Message], *, generation_prompt: bool
    ) -> tuple[list[int], list[bool]]:
        """Render the chat template; return ids, and True for the tokens that the assistant writes."""
        assert self.chat_template is not None
        hidden = Hidden(messages, self._plain, [self.chat_template, *self._template_tokens.values()])
        text, spans = completion_spans(
            self.chat_template,
            hidden.messages,
            tokens=self._template_tokens,
            generation_prompt=generation_prompt,
        )
        try:
            if hidden.found:
                ids, offsets = self._marker_encoder.encode(text, hidden.shown)
            else:
                encoding = self._parsing_backend.encode(text, add_special_tokens=False)
                ids, offsets = encoding.ids, encoding.offsets
        except (TypeError, UnicodeEncodeError) as error:
            raise self._not_text([text], error) from None
        starts = [start for start, _ in spans]
        completion = []
        for first, _ in offsets:
            span = bisect_right(starts, first) - 1
            completion.append(span >= 0 and first < spans[span][1])
        return ids, completion

    def _find_end_of_turn(self) -> int:
        """Return the special token that the template writes after the assistant's text, else EOS."""
        if END_OF_TURN in self._ids:
            return self._ids[END_OF_TURN]
        if self.chat_template is None:
            return self.eos_id
        try:
            ids, completion = self._encode_template(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                generation_prompt=False,
            )
        except UserError:
            return self.eos_id
        written = [token for token, own in zip(ids, completion, strict=True) if own]
        return next((token for token in written if token in self._special_ids), self.eos_id)

    def _id_of(self, token: str) -> int:
        if token not in self._ids:
            raise UserError(
                f"the token '{token}' is named but not in the vocabulary",
                where=self._where,
                hint=f"fix {CONFIG}",
            )
        return self._ids[token]

    def _named_tokens(self) -> dict[str, str]:
        """Return `bos_token` and the like, from the configuration, else from the map of special tokens."""
        named: dict[str, str] = {}
        for name in (SPECIAL_MAP, CONFIG):
            for key, value in self._json(name).items():
                content = value.get("content") if isinstance(value, dict) else value
                if key.endswith("_token") and isinstance(content, str):
                    named[key] = content
        return named

    def _json(self, name: str) -> dict[str, Any]:
        return _json_in(self._files, name, self._where)

    def _not_text(self, texts: Sequence[Any], error: Exception) -> Exception:
        """Return the user's error in `texts`, or the library's own error if they are sound."""
        for text in texts:
            if not isinstance(text, str):
                return TypeError(f"expected text, got {type(text).__name__}")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as broken:
                return UserError(
                    f"the text is not valid Unicode (a lone surrogate at character {broken.start})",
                    hint="repair or remove it",
                )
        return error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Open a folder with a `tokenizer.json`: ours, a model's, or any fast tokenizer of `transformers`.

    Also the one of a model on the hub (`OWNER/NAME`).

    Raises `UserError` if the folder or the file is missing, damaged, or names no end-of-document token.
    """
    path = model_folder(path, TOKENIZER_FILES)
    if not path.exists():
        raise UserError("no such folder", where=path, hint="give a folder that holds a tokenizer.json")
    if not (path / TOKENIZER).is_file():
        raise UserError(
            f"holds no {TOKENIZER}",
            where=path,
            hint="give a folder written by `koine tokenizer train` or a model's",
        )
    return Tokenizer(read_files(path), where=path)


def lacks_chat_template(path: str | Path) -> bool:
    """Return whether a folder, or a model on the hub, has a tokenizer without a chat template.

    `tokenizer.json` is not opened. Raises `UserError` where the other files cannot be read.
    """
    path = model_folder(path, TOKENIZER_FILES)
    if not (path / TOKENIZER).is_file():
        return False
    return _template_in(read_files(path, (CONFIG, TEMPLATE)), path) is None


def _template_in(files: Mapping[str, str], where: str | Path) -> str | None:
    """Return the chat template: of its own file, else of the configuration."""
    if files.get(TEMPLATE):
        return files[TEMPLATE]
    template = _json_in(files, CONFIG, where).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        template = next((one.get("template") for one in entries if one.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise UserError(
            f"the chat_template of {CONFIG} is a {type(template).__name__}, no text",
            where=where,
            hint="write a Jinja text",
        )
    return template


def _json_in(files: Mapping[str, str], name: str, where: str | Path) -> dict[str, Any]:
    if name not in files:
        return {}
    return parsed_object(files[name], f"{name} is not valid JSON", where)


def read_files(
    path: Path, names: Sequence[str] = (TOKENIZER, CONFIG, SPECIAL_MAP, TEMPLATE, TRAINING)
) -> dict[str, str]:
    """Read the texts of a tokenizer's folder by file name."""
    files = {}
    for name in names:
        if (path / name).is_file():
            files[name] = read_text(path / name)
    return files


def from_backend(backend: Any, *, training: Mapping[str, Any] | None = None) -> Tokenizer:
    """Build our tokenizer from a trained `tokenizers.Tokenizer` with our special tokens.

    training: record of the training.
    """
    named = {
        "bos_token": BOS,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "unk_token": UNK,
        "cls_token": CLS,
        "sep_token": SEP,
        "mask_token": MASK,
    }
    others = [token for token in SPECIAL_TOKENS if token not in named.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": others,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        "padding_side": "left",
        "added_tokens_decoder": {
            str(backend.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
    }
    files = {
        TOKENIZER: backend.to_str(pretty=True),
        CONFIG: json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        SPECIAL_MAP: json.dumps({**named, "additional_special_tokens": others}, ensure_ascii=False, indent=2)
        + "\n",
        TEMPLATE: CHAT_TEMPLATE,
    }
    if training is not None:
        files[TRAINING] = json.dumps(training, ensure_ascii=False, indent=2) + "\n"
    return Tokenizer(files)
