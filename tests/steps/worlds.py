"""A small corpus, tokenizers, tokens and a model for the tests of steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koine.model import preset
from koine.steps.corpora import sample_corpus
from koine.steps.text_mixture import TextMixture, TextSource, pretraining_sources
from koine.steps.tokenizers import build_tokenizer, tokenize_part
from koine.steps.training import HeldOutProbe, train_model, training_settings
from koine.train import TrainSettings

CONFIG = preset("koine-0.5m", 600)


def mixture(sources: Sequence[TextSource], steps: int, **fields: Any) -> TextMixture:
    """A mixture of two short rows."""
    return TextMixture(sources=tuple(sources), steps=steps, sequence_length=96, batch_size=2, **fields)


def settings(steps: int, **fields: Any) -> TrainSettings:
    """Settings in float32."""
    return training_settings(steps=steps, **{"learning_rate": 1e-3, "dtype": "float32", **fields})


def write_world(root: Path) -> Path:
    """Write a corpus in three languages, two tokenizers, tokens, and a model of the primary language."""
    for name in ("corpus", "universal", "cluster", "documents", "chats", "model"):
        (root / name).mkdir()
    sample_corpus(
        languages=("de", "hi", "tr"),
        primary_cluster="european",
        primary_languages=(),
        documents_per_language=60,
        questions_per_language=30,
        code_bytes=0,
        seed=0,
        out=root / "corpus",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scope in ("universal", "cluster"):
            build_tokenizer(
                root / "corpus",
                scope=scope,
                vocabulary_size=600,
                scheme="bucketed",
                english_share=0.3,
                sample_bytes=200_000,
                seed=0,
                out=root / scope,
            )
    for part, name in (("documents", "documents"), ("questions/train", "chats")):
        tokenize_part(root / "corpus", root / "cluster", part=part, domain=name, out=root / name)
    train_model(
        None,
        {"documents": root / "documents"},
        root / "cluster",
        root / "corpus",
        mixture=mixture(pretraining_sources(english_share=0.3), 2),
        settings=settings(2, evaluate_every=2),
        config=CONFIG,
        probe=HeldOutProbe(groups={"primary": ("primary",)}),
        out=root / "model",
    )
    return root
