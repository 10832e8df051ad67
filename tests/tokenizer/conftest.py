"""A small tokenizer, trained once."""

from __future__ import annotations

import warnings

import pytest

from koine.tokenizer import Tokenizer, train_tokenizer

TEXTS = {
    "en": [f"The territory number {i} isn't far; NASA's map says {i * 37}.\n\n" for i in range(200)],
    "de": [f"Das Gebiet {i} liegt nicht weit, sagt die Karte: {i * 37}." for i in range(200)],
    "hi": [f"यह क्षेत्र {i} दूर नहीं है।" for i in range(200)],
    "ja": [f"東京は日本の首都です。{i}" for i in range(200)],
}


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer(
            {code: (lambda part=part: part) for code, part in TEXTS.items()}, vocab_size=500
        )
