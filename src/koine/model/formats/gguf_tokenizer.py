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
from typing import Any, Final

from koine.errors import UserError
from koine.files import read_json
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.pretokenize import PATTERN

# Of llama.cpp's `llama_token_type`.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Our expression has no name in llama.cpp. This one's is ours, except that it takes digits by threes. Where no
# merge crosses the border of two digits (`scripts_with_other_digits`), the ids are the same. (The expression
# of `gpt-4o` leaves out combining marks and splits Indic and Thai words.)
OWN_PRE: Final = "tiny_aya"


@dataclass(frozen=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer as llama.cpp needs it.

    tokens, types: of each id.
    pre: name of the expression that splits text.
    """

    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    pre: str
    bos_id: int
    eos_id: int
    pad_id: int
    end_of_turn_id: int
    add_bos: bool
    chat_template: str | None
    scripts_with_other_digits: tuple[str, ...]
    """Unicode names of scripts ("BENGALI", ...) whose digits may get other ids in llama.cpp."""


def read_gguf_tokenizer(path: Path, *, rows: int) -> GgufTokenizer:
    """Read the tokenizer of a model directory, padded with unused tokens to the `rows` of the embedding.

    Raises `UserError` without a tokenizer, with more ids than rows, or where llama.cpp has no equal: another
    model than byte-level BPE, a normaliser other than NFC, an unknown expression.
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
    pre = _pre_tokenizer(content, where)
    if not content["model"]["merges"]:
        raise UserError(
            "the tokenizer has no merges, and llama.cpp reads no model without any",
            where=where,
            hint="train one with a larger vocabulary",
        )
    special = {token["id"]: bool(token.get("special")) for token in content.get("added_tokens", [])}
    tokens = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    for token, index in tokenizer.vocabulary().items():
        tokens[index] = token
        types[index] = (CONTROL if special[index] else USER_DEFINED) if index in special else NORMAL
    return GgufTokenizer(
        tokens=tuple(tokens),
        types=tuple(types),
        merges=tuple(_merge(merge) for merge in content["model"]["merges"]),
        pre=pre,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        end_of_turn_id=tokenizer.end_of_turn_id,
        # Without a BOS token, EOS takes its place (koine.tokenizer).
        add_bos=tokenizer.bos_id != tokenizer.eos_id,
        chat_template=_chat_template(tokenizer),
        scripts_with_other_digits=scripts_with_other_digits(content) if pre == OWN_PRE else (),
    )


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
    if kind != "BPE" or content["model"].get("byte_fallback"):
        raise UserError(
            f"the tokenizer's model is {kind}" + (" with byte fallback" if kind == "BPE" else ""),
            where=where,
            hint="only byte-level BPE is exported to GGUF",
        )
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise UserError(
            f"the tokenizer's normaliser is {normalizer.get('type')}",
            where=where,
            hint="llama.cpp normalises nothing; only NFC, in which most text is written, is exported",
        )
    name = _pre_name(_steps(content.get("pre_tokenizer")))
    if name is None:
        raise UserError(
            "llama.cpp has no name for the expression that cuts this tokenizer's text",
            where=where,
            hint="exported are Koine's own tokenizers, Cohere's and GPT-2's",
        )
    return name


def _pre_name(steps: list[tuple[str, Any]]) -> str | None:
    own = [("Split", (PATTERN, "Isolated", False)), ("ByteLevel", False)]
    gpt2 = [("ByteLevel", True)]
    names = [
        (own, OWN_PRE),
        ([("Digits", True), *gpt2], "command-r"),
        (gpt2, "gpt-2"),
        ([("Split", (GPT2_PATTERN, "Isolated", False)), ("ByteLevel", False)], "gpt-2"),
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
