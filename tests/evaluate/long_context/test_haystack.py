"""Haystack text in pieces."""

from __future__ import annotations

import random

import pytest

from koine.evaluate.long_context.haystack import (
    LONGEST_PIECE,
    make_haystack,
    split_pieces,
)
from koine.tokenizer import Tokenizer


@pytest.mark.parametrize(
    "text",
    [
        'One. Two 3.14 is a number! "Three?" Four',
        "一つ。二つ！「三つ。」四つ\n五つ",
        "एक वाक्य। दूसरा वाक्य॥ तीसरा",
        "ไทยไม่มีจุด" * 60,
        "word " * 200,
        "\nbegins with a line\n\n\nand goes on…  then. stops",
    ],
)
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = split_pieces(text)
    assert "".join(pieces) == text.rstrip()
    assert len(pieces) > 1
    assert max(map(len, pieces)) <= LONGEST_PIECE + 2


def test_pieces_end_with_sentences() -> None:
    assert split_pieces("One. Two 3.14 is! “Three?” Four") == ["One.", " Two 3.14 is!", " “Three?”", " Four"]
    assert split_pieces("一つ。二つ！「三つ。」四つ") == ["一つ。", "二つ！", "「三つ。」", "四つ"]


def test_a_short_haystack_begins_anew(words: Tokenizer) -> None:
    hay = make_haystack([("One two three. Four five six.", "en")], words.encode, at_least=10, source="here")
    cut = hay.cut(5 * hay.tokens, random.Random(0), ends_on_character=lambda ids: True)
    assert sum(map(len, cut)) == 5 * hay.tokens
    assert words.decode([token for piece in cut for token in piece]).count("Four five six.") >= 4
