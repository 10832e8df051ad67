"""Letters that a tokenizer splits, counted on vocabularies small enough to count by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from koine.tokenizer.split_characters import SplitCharacters, split_characters


class Pieces:
    """A tokenizer whose tokens are given pieces of bytes; unknown text has the empty one."""

    unknown_id = None

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(range(self.vocab_size)) for _ in texts]

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def unknown_bytes(self, texts: Sequence[str]) -> list[int]:
        return [0] * len(texts)


KA = "क".encode()  # three bytes


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"ab", KA + KA), SplitCharacters(4, 0, 0)),
        ((b"a", KA[:1], KA[1:2], KA[2:]), SplitCharacters(2, 1, 1)),
        ((b"a", KA[:2], KA[2:]), SplitCharacters(2, 1, 0)),
        # The last byte of the first letter and the first of the second are one token: neither is single bytes.
        ((KA[:1], KA[1:2], KA[2:] + KA[:1], KA[1:]), SplitCharacters(2, 2, 0)),
        # Digits, spaces and signs are no letters; a byte that begins no character is none either.
        ((b"1 +", "€".encode()[:1], "€".encode()[1:], b"\xa4", b"x"), SplitCharacters(1, 0, 0)),
        # A combining vowel sign counts as a letter.
        (("कि".encode()[:4], "कि".encode()[4:]), SplitCharacters(2, 1, 0)),
        ((), SplitCharacters(0, 0, 0)),
    ],
)
def test_letters_are_counted(pieces: tuple[bytes, ...], expected: SplitCharacters) -> None:
    assert split_characters(Pieces(*pieces), ["text"]) == expected
