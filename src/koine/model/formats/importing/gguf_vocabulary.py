"""Build `tokenizer.json` and its companions from the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from koine.errors import UserError
from koine.fields import short_repr
from koine.model.formats.importing.gguf_file import DAMAGED, GgufFile
from koine.model.formats.importing.metadata import Metadata
from koine.model.formats.importing.pre_tokenizers import SPLITTINGS
from koine.tokenizer.template import check_template

# Of llama.cpp's `llama_token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE: Final = "▁"
"""The character that SentencePiece writes for a space."""
_GEMMA: Final = ("gemma2", "gemma3")
_NAMED: Final = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ALSO_END: Final = ("eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class GgufVocabulary:
    """A file's tokenizer.

    Attributes:
        files: texts by file name: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
        kind: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        tokens: number of tokens.
        chat_template: Jinja text, or None.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, for `config.json`.
        end_ids: all ids that end a text, the first one first.
    """

    files: dict[str, str]
    kind: str
    tokens: int
    chat_template: str | None
    ids: dict[str, int | None]
    end_ids: tuple[int, ...]


def read_gguf_vocabulary(file: GgufFile, *, rows: int, context: int) -> GgufVocabulary:
    """Convert the tokenizer.

    Args:
        file: the file.
        rows: of the embedding; it may have more than there are tokens.
        context: longest text of the model, in tokens.

    Raises:
        UserError: there is no tokenizer, one that is not known, more tokens than rows, an id outside the
            vocabulary, or a chat template that does not compile.
    """
    metadata = Metadata(file.metadata, file.where)
    kind = metadata.text("tokenizer.ggml.model")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not tokens:
        raise UserError(
            f"has the tokenizer {short_repr(kind)}" if tokens else "holds no tokenizer",
            where=file.where,
            hint="the tokenizers gpt2 (byte-level BPE) and llama (SentencePiece BPE) are imported",
        )
    types = _types(metadata, len(tokens))
    tokens, types = _without_padding(tokens, types)
    if len(tokens) > rows:
        raise UserError(
            f"has {len(tokens):,} tokens and an embedding of {rows:,} rows", where=file.where, hint=DAMAGED
        )
    ids = {name: metadata.size(f"tokenizer.ggml.{key}") for name, key in _NAMED.items()}
    also = [metadata.size(f"tokenizer.ggml.{key}") for key in _ALSO_END]
    for one in (*ids.values(), *also):
        if one is not None and one >= len(tokens):
            raise UserError(f"names the token {one:,} of {len(tokens):,}", where=file.where, hint=DAMAGED)
    if ids["eos_token"] is None:
        raise UserError(
            "names no 'tokenizer.ggml.eos_token_id', the token that ends a text",
            where=file.where,
            hint="the file is damaged, or its converter is of another kind",
        )
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend = build(metadata, tokens, types, ids)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bool, _adds_bos(metadata, kind))
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", bool, False)
    named = {name: tokens[one] for name, one in ids.items() if one is not None}
    if add_bos and "bos_token" not in named:
        raise UserError("names no 'tokenizer.ggml.bos_token_id'", where=file.where, hint=DAMAGED)
    _add_ends(backend, named, ids, bos=add_bos, eos=add_eos)
    template = metadata.text("tokenizer.chat_template")
    if template is not None:
        check_template(template, where=file.where)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "padding_side": "left",
    }
    files = {
        "tokenizer.json": backend.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2) + "\n",
        **({} if template is None else {"chat_template.jinja": template}),
    }
    end = dict.fromkeys(one for one in (ids["eos_token"], *also) if one is not None)
    numbers = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token")}
    return GgufVocabulary(files, kind, len(tokens), template, numbers, tuple(end))


def _adds_bos(metadata: Metadata, kind: str) -> bool:
    """Return whether llama.cpp puts BOS before a text where the file does not say."""
    if kind == "llama":
        return True
    return SPLITTINGS[metadata.text("tokenizer.ggml.pre", "default")].add_bos


def _types(metadata: Metadata, count: int) -> list[int]:
    stored = metadata.numbers("tokenizer.ggml.token_type")
    if stored is None:
        return [NORMAL] * count
    if len(stored) != count:
        raise UserError(
            f"has {count:,} tokens and {len(stored):,} types of tokens", where=metadata.where, hint=DAMAGED
        )
    return [int(one) for one in stored]


def _without_padding(tokens: Sequence[str], types: Sequence[int]) -> tuple[list[str], list[int]]:
    """Leave out the tokens at the end that the converter made up for rows of the embedding without one."""
    count = len(tokens)
    while count and types[count - 1] == UNUSED and tokens[count - 1] == f"[PAD{count - 1}]":
        count -= 1
    return list(tokens[:count]), list(types[:count])


def _indexed(tokens: Sequence[str], metadata: Metadata) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if token in vocabulary:
            raise UserError(f"has the token {short_repr(token)} twice", where=metadata.where, hint=DAMAGED)
        vocabulary[token] = index
    return vocabulary


def _byte_level(
    metadata: Metadata, tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> Any:
    """Build byte-level BPE, split as `tokenizer.ggml.pre` says."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    name = metadata.text("tokenizer.ggml.pre", "default")
    if name not in SPLITTINGS:
        raise UserError(
            f"splits text in the way {short_repr(name)} ('tokenizer.ggml.pre'), which is not known here",
            where=metadata.where,
            hint=f"these are imported: {', '.join(SPLITTINGS)}",
        )
    splitting = SPLITTINGS[name]
    stored = metadata.texts("tokenizer.ggml.merges")
    if stored is None:
        raise UserError("lacks 'tokenizer.ggml.merges'", where=metadata.where, hint=DAMAGED)
    vocabulary = _indexed(tokens, metadata)
    merges = [_merge(one, vocabulary, metadata) for one in stored]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.ignore_merges))
    if splitting.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitting.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, types, ids)
    return backend


def _merge(text: str, vocabulary: Mapping[str, int], metadata: Metadata) -> tuple[str, str]:
    """Return the two parts of a merge, "left right". Raises `UserError` where they are no tokens."""
    # A left part may begin with a space.
    at = text.find(" ", 1)
    left, right = text[:at], text[at + 1 :]
    if at < 0 or any(one not in vocabulary for one in (left, right, left + right)):
        raise UserError(
            f"has the merge {short_repr(text)}, which is not of two tokens into a third",
            where=metadata.where,
            hint=DAMAGED,
        )
    return left, right


def _sentencepiece(
    metadata: Metadata, tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> Any:
    """Build SentencePiece's BPE, with bytes for what the vocabulary lacks.

    The file has no merges, only scores: the best token that two neighbours make is merged first. Gemma's
    scores do not give its order, its ids do.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    for key in ("precompiled_charsmap", "remove_extra_whitespaces"):
        if not np.array_equal(metadata.values.get(f"tokenizer.ggml.{key}", False), False):
            raise UserError(
                f"normalises text ('tokenizer.ggml.{key}') in a way that is not imported",
                where=metadata.where,
                hint="import the model's own checkpoint",
            )
    gemma = metadata.text("general.architecture") in _GEMMA
    # The converter writes user-defined tokens with plain spaces.
    spelled = [_SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = _indexed(spelled, metadata)
    scores = metadata.numbers("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(spelled):
        raise UserError(
            "lacks 'tokenizer.ggml.scores', one for each token", where=metadata.where, hint=DAMAGED
        )
    ranks = [-index for index in range(len(spelled))] if gemma else scores.tolist()
    unknown = ids["unk_token"]
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            merges_by_rank(vocabulary, ranks),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, not gemma)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", _SPACE)
    if gemma:
        backend.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    backend.decoder = decoders.Sequence(steps)
    _add_tokens(
        backend,
        spelled,
        [
            NORMAL if one == USER_DEFINED and token.strip(_SPACE) == "" else one
            for one, token in zip(types, spelled, strict=True)
        ],
        ids,
    )
    return backend


def merges_by_rank(vocabulary: Mapping[str, int], ranks: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece vocabulary: every split of a token into two tokens, best first.

    Args:
        vocabulary: token -> id.
        ranks: of each id, higher is better. Of the splits of one token, that with the longest left part is
            first, as `transformers` orders them.
    """
    found: list[tuple[float, int, str, str]] = []
    for token, index in vocabulary.items():
        for at in range(len(token) - 1, 0, -1):
            left, right = token[:at], token[at:]
            if left in vocabulary and right in vocabulary:
                found.append((-ranks[index], -at, left, right))
    found.sort(key=lambda one: one[:2])
    return [(left, right) for _, _, left, right in found]


def _add_tokens(
    backend: Any, tokens: Sequence[str], types: Sequence[int], ids: Mapping[str, int | None]
) -> None:
    """Add the tokens that are found in text as they stand: control tokens, and those of the user."""
    from tokenizers import AddedToken

    named = {one for one in ids.values() if one is not None}
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or index in named:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_ends(
    backend: Any, named: Mapping[str, str], ids: Mapping[str, int | None], *, bos: bool, eos: bool
) -> None:
    """Have an encoded text begin and end as the file says."""
    from tokenizers import processors

    begin = [named["bos_token"]] if bos else []
    end = [named["eos_token"]] if eos else []
    if not begin and not end:
        return
    numbers = [(named[name], ids[name]) for name, on in (("bos_token", bos), ("eos_token", eos)) if on]
    backend.post_processor = processors.TemplateProcessing(
        single=[*begin, "$A", *end],
        pair=[*begin, "$A", *end, *(f"{one}:1" for one in begin), "$B:1", *(f"{one}:1" for one in end)],
        special_tokens=list(dict(numbers).items()),
    )
