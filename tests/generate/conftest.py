"""Fixtures: the tiny decoder, a fixed seed, and a model directory with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.model.conftest import _seeded as _seeded
from tests.model.conftest import tiny as tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest preset over bytes, with a context that a test cannot fill."""
    import torch

    from koine.model import Decoder, preset, save_model
    from koine.tokenizer import train_tokenizer
    from koine.tokenizer.special import SMALLEST_VOCABULARY

    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(
        {"de": lambda: ["ein Text"]}, vocab_size=SMALLEST_VOCABULARY, scheme="natural", english_share=None
    )
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(0)
    config = replace(preset("koine-0.5m", SMALLEST_VOCABULARY), max_position_embeddings=1_000_000)
    model = Decoder(config)
    with torch.no_grad():
        # Special tokens score 0, below the best of the others: a greedy answer never ends and every token
        # shows.
        model.embedding.weight[: SMALLEST_VOCABULARY - 256] = 0
    save_model(model, folder / "model", tokenizer=folder / "tokenizer")
    return folder / "model"
