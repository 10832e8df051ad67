"""SentencePiece's BPE with byte fallback (Llama 2, Gemma) as llama.cpp's tokenizer `llama` reads it.

A `tokenizer.json` has a list of merges; llama.cpp merges the neighbours whose union is the token of the
highest score. The two agree where the merges are those that SentencePiece's scores give: every way to cut a
token into two tokens is a merge, and the merges of one token have no other's between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from koine.errors import UserError
from koine.tokenizer.token_bytes import BYTE_TOKEN, SPACE_MARK

_REPLACE: Final = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
_PREPEND: Final = {"type": "Prepend", "prepend": SPACE_MARK}
_NO_SPLIT: Final = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


@dataclass(frozen=True, kw_only=True)
class SentencePiece:
    """The data of such a tokenizer that llama.cpp needs.

    scores: by token of the vocabulary.
    add_space_prefix: a space goes before the text, and in llama.cpp after each special token too.
    fewer_spaces: the tokenizer itself leaves it out before text that begins with a space, or after special
        tokens.
    """

    scores: dict[str, float]
    add_space_prefix: bool
    fewer_spaces: bool


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Return whether a `tokenizer.json` is BPE with byte fallback."""
    model = content["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_sentencepiece(content: dict[str, Any], where: Path) -> SentencePiece:
    """Convert a `tokenizer.json`. Raises `UserError` where llama.cpp would give other tokens."""
    prefix = _space_prefix(content)
    if prefix is None:
        raise UserError(
            "its text is changed before it is tokenized, in a way that llama.cpp does not have",
            where=where,
            hint="exported are SentencePiece's tokenizers as those of Llama 2 and Gemma",
        )
    vocabulary: dict[str, int] = content["model"]["vocab"]
    lacking = next((byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary), None)
    if lacking is not None:
        raise UserError(
            f"the tokenizer lacks the token <0x{lacking:02X}>",
            where=where,
            hint="llama.cpp needs a token for every byte",
        )
    return SentencePiece(
        scores=_scores(vocabulary, [_pair(merge) for merge in content["model"]["merges"]], where),
        add_space_prefix=prefix != "never",
        fewer_spaces=prefix == "fewer",
    )


def is_byte(token: str) -> bool:
    """Return whether a token is that of a byte, such as `<0x0A>`."""
    return BYTE_TOKEN.fullmatch(token) is not None


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """Return a merge as a pair; old files store a string."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _scores(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], where: Path) -> dict[str, float]:
    """Return 0 for the token that is merged first, -1 for the next, and so on; the lowest for all others."""

    def refuse(token: str) -> UserError:
        return UserError(
            f"the merges that give '{token}' are not those of SentencePiece",
            where=where,
            hint="llama.cpp merges by scores of tokens, which this tokenizer does not have",
        )

    order: dict[str, int] = {}
    last = ""
    for first, second in merges:
        token = first + second
        if token != last and token in order:
            raise refuse(token)
        order.setdefault(token, len(order))
        last = token
    known = set(merges)
    for token in order:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise refuse(token)
    return {token: float(-order.get(token, len(order))) for token in vocabulary}


def _space_prefix(content: dict[str, Any]) -> str | None:
    """Return where a space goes before text: `always`, `never`, or in `fewer` places than in llama.cpp.

    None for other preparations of the text.
    """
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    steps = _parts(normalizer, "normalizers")
    if pre_tokenizer is not None and pre_tokenizer.get("type") == "Metaspace":
        plain = pre_tokenizer.get("split") is False and pre_tokenizer.get("replacement") == SPACE_MARK
        schemes = {"always": "fewer", "first": "fewer", "never": "never"}
        return schemes.get(pre_tokenizer.get("prepend_scheme")) if plain and not steps else None
    # Cutting at spaces does nothing after they were replaced.
    if pre_tokenizer not in (None, _NO_SPLIT):
        return None
    if steps == [_REPLACE]:
        return "never"
    return "always" if steps == [_PREPEND, _REPLACE] else None


def _parts(step: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    parts: list[dict[str, Any]] = step[name] if step.get("type") == "Sequence" else [step]
    return parts
