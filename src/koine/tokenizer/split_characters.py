"""Count the letters of a text that a tokenizer splits over several tokens, by script.

A vocabulary of bytes can spell every script. Where it has no tokens for a script's letters, each letter costs
two or three tokens, and no token stands for a letter.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from koine.tokenizer.token_bytes import AnyTokenizer


@dataclass(frozen=True)
class SplitCharacters:
    """Letters of a text as a tokenizer spells it."""

    letters: int = 0
    """Letters and combining marks with tokens; those that are read as unknown are not among them."""
    split: int = 0
    """Letters whose bytes lie in several tokens."""
    single_bytes: int = 0
    """Letters of which each byte is a token of its own."""


def split_characters(tokenizer: AnyTokenizer, texts: Sequence[str]) -> SplitCharacters:
    """Count the letters that the tokenizer splits, in the text as its tokens spell it."""
    letters = split = single_bytes = 0
    for ids in tokenizer.encode_batch(texts):
        pieces = [tokenizer.token_bytes(token) for token in ids]
        cuts = set(accumulate(map(len, pieces), initial=0))
        start = 0
        # Bytes that belong to no character, beside unknown text, become surrogates, which are no letters.
        for character in b"".join(pieces).decode("utf-8", "surrogateescape"):
            end = start + len(character.encode("utf-8", "surrogateescape"))
            if unicodedata.category(character)[0] in "LM":
                inside = sum(place in cuts for place in range(start + 1, end))
                letters += 1
                split += inside > 0
                single_bytes += inside > 0 and all(place in cuts for place in range(start, end + 1))
            start = end
    return SplitCharacters(letters, split, single_bytes)
