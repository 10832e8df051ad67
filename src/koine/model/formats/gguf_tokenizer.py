"""Convert a tokenizer directory to the `tokenizer.ggml.*` keys of a GGUF file.

llama.cpp splits text by built-in regular expressions, chosen by name (`tokenizer.ggml.pre`), and does not
normalise it.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from koine.errors import UserError
from koine.files import read_json, read_json_object
from koine.model.formats.gguf_sentencepiece import (
    SentencePiece,
    is_byte,
    is_sentencepiece,
    read_sentencepiece,
)
from koine.model.formats.importing.pre_tokenizers import SPLITTINGS
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.pretokenize import PATTERN
from koine.tokenizer.token_bytes import SPACE_MARK

# Of llama.cpp's `llama_token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
(LLAMA3_PATTERN,) = SPLITTINGS["llama-bpe"].expressions
(QWEN2_PATTERN,) = SPLITTINGS["qwen2"].expressions

# Our expression has no name in llama.cpp. This one's is ours, except that it takes digits by threes. Where no
# merge crosses the border of two digits (`scripts_with_other_digits`), the ids are the same. (The expression
# of `gpt-4o` leaves out combining marks and splits Indic and Thai words.)
OWN_PRE: Final = "tiny_aya"


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer as llama.cpp needs it.

    model: `gpt2` (byte-level BPE) or `llama` (SentencePiece's BPE with byte fallback).
    tokens, types: of each id. scores: of each id, for `llama`. merges: for `gpt2`.
    pre: name of the expression that splits text.
    add_bos: an encoded text begins with BOS.
    fewer_spaces: llama.cpp puts a space where this tokenizer does not (`gguf_sentencepiece`).
    """

    model: Literal["gpt2", "llama"]
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    pre: str
    bos_id: int
    eos_id: int
    pad_id: int
    unknown_id: int | None
    end_of_turn_id: int
    add_bos: bool
    add_space_prefix: bool
    fewer_spaces: bool
    chat_template: str | None
    scripts_with_other_digits: tuple[str, ...]
    """Unicode names of scripts ("BENGALI", ...) whose digits may get other ids in llama.cpp."""


def read_gguf_tokenizer(path: Path, *, rows: int) -> GgufTokenizer:
    """Read the tokenizer of a model directory, padded with unused tokens to the `rows` of the embedding.

    Raises `UserError` without a tokenizer, with more ids than rows, or where llama.cpp has no equal: another
    model than BPE, a normaliser other than NFC, an unknown expression, merges that are not SentencePiece's.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the model {rows}",
            where=path,
            hint="these are not a pair; put the tokenizer that the model was trained with into its folder",
        )
    where = path / "tokenizer.json"
    content = read_json(where)
    if content["model"].get("type") == "BPE" and not content["model"]["merges"]:
        raise UserError(
            "the tokenizer has no merges, and llama.cpp reads no model without any",
            where=where,
            hint="train one with a larger vocabulary",
        )
    pieces = read_sentencepiece(content, where) if is_sentencepiece(content) else None
    pre = _pre_tokenizer(content, where) if pieces is None else "default"
    tokens, types = _tokens(tokenizer, content, rows, pieces)
    return GgufTokenizer(
        model="gpt2" if pieces is None else "llama",
        tokens=tuple(tokens),
        types=tuple(types),
        scores=None if pieces is None else _padded_scores(pieces, tokens),
        merges=None if pieces else tuple(_merge(merge) for merge in content["model"]["merges"]),
        pre=pre,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        unknown_id=tokenizer.unknown_id,
        end_of_turn_id=tokenizer.end_of_turn_id,
        add_bos=_adds_bos(path, content, tokenizer.bos_id),
        add_space_prefix=pieces is not None and pieces.add_space_prefix,
        fewer_spaces=pieces is not None and pieces.fewer_spaces,
        chat_template=_chat_template(tokenizer),
        scripts_with_other_digits=scripts_with_other_digits(content) if pre == OWN_PRE else (),
    )


def _tokens(
    tokenizer: Tokenizer, content: dict[str, Any], rows: int, pieces: SentencePiece | None
) -> tuple[list[str], list[int]]:
    """Return the token and the type of each id."""
    added = {token["id"]: bool(token.get("special")) for token in content.get("added_tokens") or []}
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for token, index in tokenizer.vocabulary().items():
        tokens[index] = token
        if pieces is not None and index == tokenizer.unknown_id:
            types[index] = UNKNOWN
        elif pieces is not None and is_byte(token):
            types[index] = BYTE
        # llama.cpp writes the mark of a space in a user-defined token as it stands, not as a space.
        elif index not in added or (pieces is not None and not added[index] and SPACE_MARK in token):
            types[index] = NORMAL
        else:
            types[index] = CONTROL if added[index] else USER_DEFINED
    return tokens, types


def _padded_scores(pieces: SentencePiece, tokens: list[str]) -> tuple[float, ...]:
    lowest = min(pieces.scores.values())
    return tuple(pieces.scores.get(token, lowest) for token in tokens)


def _adds_bos(path: Path, content: dict[str, Any], bos_id: int) -> bool:
    """Return whether the tokenizer puts BOS before a text: its post-processor, else its configuration."""
    processor = content.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing":
            first = part["single"][0].get("SpecialToken", {}).get("id")
            return bool(first) and bos_id in part["special_tokens"][first]["ids"]
    config = path / "tokenizer_config.json"
    return config.exists() and read_json_object(config).get("add_bos_token") is True


def _merge(merge: str | list[str]) -> str:
    """Return a merge as one string; old files store a string, new ones a pair."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _chat_template(tokenizer: Tokenizer) -> str | None:
    """Replace the template's `generation` blocks by plain ones.

    They mark the model's answers for training, and llama.cpp's readers of Jinja reject them.
    """
    template = tokenizer.chat_template
    if template is None:
        return None
    opened = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", opened)


def _pre_tokenizer(content: dict[str, Any], where: Path) -> str:
    """Return llama.cpp's name of the expression by which this `tokenizer.json` splits text."""
    kind = content["model"].get("type")
    if kind != "BPE":
        raise UserError(
            f"the tokenizer's model is {kind}",
            where=where,
            hint="only byte-level BPE and SentencePiece's BPE with byte fallback are exported to GGUF",
        )
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UserError(
            f"the tokenizer's normaliser is {normalizer.get('type')}",
            where=where,
            hint="llama.cpp normalises nothing; only NFC, in which most text is written, is exported",
        )
    name = _pre_name(
        _steps(content.get("pre_tokenizer")),
        nfc=normalizer is not None,
        whole_pieces=bool(content["model"].get("ignore_merges")),
    )
    if name is None:
        raise UserError(
            "llama.cpp has no name for the expression that cuts this tokenizer's text",
            where=where,
            hint="exported are Koine's own tokenizers and those of Cohere, GPT-2, Llama 3, Qwen2 and SmolLM",
        )
    return name


def _pre_name(steps: list[tuple[str, Any]], *, nfc: bool, whole_pieces: bool) -> str | None:
    """Return llama.cpp's name of a way to split text; None without one.

    nfc: text is normalised. whole_pieces: a piece that is a token is taken whole, as in Llama 3.
    """

    def split(pattern: str) -> list[tuple[str, Any]]:
        return [("Split", (pattern, "Isolated", False)), ("ByteLevel", False)]

    gpt2 = [("ByteLevel", True)]
    if whole_pieces:
        return "llama-bpe" if steps == split(LLAMA3_PATTERN) else None
    names = [
        (split(PATTERN), OWN_PRE),
        # The two split in the same way.
        ([("Digits", True), *gpt2], "command-r" if nfc else "smollm"),
        (gpt2, "gpt-2"),
        (split(GPT2_PATTERN), "gpt-2"),
        (split(LLAMA3_PATTERN), "dbrx"),
        (split(QWEN2_PATTERN), "qwen2"),
    ]
    return next((name for known, name in names if known == steps), None)


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the pre-tokenizers in order, each as its type and its settings."""
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return [step for part in pre_tokenizer["pretokenizers"] for step in _steps(part)]
    if kind == "Split":
        pattern = pre_tokenizer["pattern"]
        return [
            (
                kind,
                (pattern.get("Regex"), pre_tokenizer["behavior"].capitalize(), pre_tokenizer["invert"]),
            )
        ]
    if kind == "ByteLevel":
        # llama.cpp adds no space before the text under these names.
        return [(kind, None if pre_tokenizer["add_prefix_space"] else pre_tokenizer.get("use_regex", True))]
    if kind == "Digits":
        return [(kind, pre_tokenizer["individual_digits"])]
    return [(kind, None)]


def scripts_with_other_digits(content: dict[str, Any]) -> tuple[str, ...]:
    """Return scripts whose digits the merges of this `tokenizer.json` join where two are in one piece.

    Our expression splits between all digits, `OWN_PRE` only after three. A digit beyond ASCII has several
    bytes. A merge learned inside words (the last byte of one letter with the first of the next) then fits
    between two digits too, where it comes before those inside each.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import pre_tokenizers

    backend = Backend.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    zeros = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.digit(chr(code), -1) == 0]
    decimal = [zero for zero in zeros if unicodedata.category(zero) == "Nd"]
    found = set()
    for zero in decimal:
        digits = [chr(ord(zero) + value) for value in range(10)]
        alone = {digit: backend.encode(digit, add_special_tokens=False).ids for digit in digits}
        pairs = [(first, second) for first in digits for second in digits]
        together = backend.encode_batch([a + b for a, b in pairs], add_special_tokens=False)
        if any(encoding.ids != alone[a] + alone[b] for (a, b), encoding in zip(pairs, together, strict=True)):
            found.add(unicodedata.name(zero).split(" DIGIT")[0])
    return tuple(sorted(found))
