"""Held-out texts, by hand."""

from __future__ import annotations

from koine.tokenizer.holdout import split_texts


def test_held_out_texts_are_every_third_from_the_second() -> None:
    def texts() -> list[tuple[str, str]]:
        return [("de", str(number)) for number in range(1, 8)] + [("fr", "only")]

    assert [text for _, text in split_texts(texts, heldout=True, every=3)()] == ["2", "5"]
    assert [text for _, text in split_texts(texts, heldout=False, every=3)()] == [
        "1",
        "3",
        "4",
        "6",
        "7",
        "only",
    ]
