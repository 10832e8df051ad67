"""Matching of two vocabularies, worked out by hand."""

from __future__ import annotations

from koine.tokenizer.vocabulary_match import match_vocabularies

from .letters import Letters


def test_duplicate_tokens_match_in_order_and_special_ones_by_role() -> None:
    old, new = Letters("ab", twice="a"), Letters("a", twice="a")
    match = match_vocabularies(old, new, old_special={}, new_special={}, parts=[(5, 1), (0, 1)])
    assert match.shared == {0: 0, 1: 2, 5: 1}
    lone = match_vocabularies(Letters("ab"), Letters("a", twice="ab"), old_special={}, new_special={})
    assert lone.shared == {0: 0, 1: 0, 2: 1}
    assert lone.dropped == ()


def test_a_part_of_a_character_is_spelled_by_the_first_token_of_each_byte() -> None:
    """Byte-fallback vocabularies hold some bytes twice; the first is used to spell a part."""

    class Bytes(Letters):
        def __init__(self, pieces: list[bytes]) -> None:
            super().__init__("")
            self.data = pieces
            self.vocab_size = len(pieces)

        def token_bytes(self, token_id: int) -> bytes:
            return self.data[token_id]

    old = Bytes([b"\xe0", b"\xb8", b"\xe0", b"\xb8"])
    match = match_vocabularies(old, Bytes([b"\xe0\xb8", b"\xe0\xb9"]), old_special={}, new_special={})
    assert match.pieces == {0: (0, 1)}
    assert match.unspelled == (1,)
