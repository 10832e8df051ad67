"""A model with a German tokenizer, and a tokenizer of two languages."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from koine.model import Decoder, ModelConfig, save_model
from koine.tokenizer import Tokenizer, train_tokenizer

GERMAN = [f"Der Fluss {i} fließt zum weiten Meer." for i in range(60)]
KOREAN = [f"서울은 대한민국의 수도이다. {i}" for i in range(60)]


def trained(texts: list[str], size: int) -> Tokenizer:
    """Train a tokenizer without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train_tokenizer({"de": lambda: texts}, vocab_size=size, english_share=None)


@pytest.fixture
def folders(tmp_path: Path, tiny: ModelConfig) -> tuple[Path, Path]:
    """A model with a German tokenizer, and a tokenizer trained on German and Korean."""
    old = trained(GERMAN, 340)
    save_model(Decoder(replace(tiny, vocab_size=old.vocab_size)), tmp_path / "model")
    old.save(tmp_path / "model")
    trained(GERMAN + KOREAN, 380).save(tmp_path / "new")
    return tmp_path / "model", tmp_path / "new"
