"""Bytes of tokens, for vocabularies like Gemma's and Llama's, against the original text."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.loaders import open_tokenizer
from koine.tokenizer.token_bytes import exact_ids
from koine.tokenizer.vocabulary_match import match_vocabularies

TEXTS = ["The territory number 7 isn't far.", "a ปลา b", "サ  x\n\nThe map", "▁"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_the_tokens_are_the_text(metaspace: Path, text: str) -> None:
    tokenizer = load_tokenizer(metaspace)
    ids = tokenizer.encode(text)
    data = b"".join(map(tokenizer.token_bytes, ids))
    opened = open_tokenizer(metaspace)
    assert data == b"".join(map(opened.token_bytes, ids))
    assert data.removeprefix(b" ").decode() == text.replace("▁", " ").removeprefix(" ")
    assert tokenizer.lossless
    assert tokenizer.unknown_bytes([text]) == [0]


def test_special_tokens_stand_for_nothing_and_byte_tokens_for_a_byte(metaspace: Path) -> None:
    tokenizer = load_tokenizer(metaspace)
    ids = tokenizer.vocabulary()
    assert [tokenizer.token_bytes(ids[token]) for token in ("<s>", "</s>", "<unk>")] == [b"", b"", b""]
    assert tokenizer.token_bytes(ids["<0xE0>"]) == b"\xe0"
    assert tokenizer.token_bytes(ids["▁"]) == b" "


def test_exact_ids_where_texts_begin_with_a_space(metaspace: Path) -> None:
    tokenizer = load_tokenizer(metaspace)
    for text in (" The", " far", " ปลา", "ปลา"):
        ids = exact_ids(tokenizer, text)
        assert ids is not None
        assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


def test_a_vocabulary_that_holds_bytes_twice_is_matched_with_itself_token_by_token(metaspace: Path) -> None:
    """`f` and `<0x66>` are the same byte, each with its own row."""
    opened = open_tokenizer(metaspace)
    match = match_vocabularies(opened, opened, old_special={}, new_special={})
    assert all(new == old for new, old in match.shared.items())
    assert match.dropped == ()


def test_a_byte_level_vocabulary_matches_one_with_byte_tokens(small: Tokenizer, metaspace: Path) -> None:
    tokenizer = load_tokenizer(metaspace)
    match = match_vocabularies(tokenizer, small, old_special={}, new_special={})
    for new, old in match.shared.items():
        assert tokenizer.token_bytes(old) == small.token_bytes(new)
    exact = [
        b"".join(map(tokenizer.token_bytes, ids)) == small.token_bytes(new)
        for new, ids in match.pieces.items()
    ]
    # Llama's begins a lone `ing` with a space, and then there is no other spelling of it than by its bytes.
    assert sum(exact) > 0.8 * len(exact) > 0
