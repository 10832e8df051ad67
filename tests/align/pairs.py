"""Small pairs in two languages, a tokenizer for them, and their token shards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koine.data import tokenize
from koine.data.mixture import Mixture, Phase, Source
from koine.tokenizer import train_tokenizer
from tests.data.conftest import document, write_records


def pair_records(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs in English and German with soft labels and margins; the good answers have the word `good`."""
    draw = random.Random(seed)
    records = []
    for number in range(count):
        words = document(number, 12).split()
        good, bad = [*words[: draw.randint(2, 5)], "good"], [*words[3 : 3 + draw.randint(1, 6)], "bad"]
        records.append(
            {
                "id": f"pair{number}",
                "language": ("en", "de")[number % 2],
                "prompt": " ".join(words[: draw.randint(1, 6)]),
                "chosen": " ".join(good),
                "rejected": " ".join(bad),
                "probability": (1.0, 0.8, 0.5)[number % 3],
                "margin": (0.0, 0.5)[number % 2],
            }
        )
    return records


def write_tokenizer(folder: Path) -> Path:
    """Train a tokenizer of 350 tokens."""
    texts = [document(number, 30) for number in range(200)]
    folder.mkdir(parents=True)
    train_tokenizer({"en": lambda: texts}, vocab_size=350, english_share=None, min_frequency=2).save(folder)
    return folder


def write_pairs(folder: Path, tokenizer: Path, records: Sequence[dict[str, Any]] | None = None) -> Path:
    """Tokenize pairs."""
    path = write_records(folder.with_suffix(".jsonl"), list(records or pair_records()))
    tokenize(path, tokenizer, kind="preferences", out=folder)
    return folder


def pair_mixture(tokens: Path, *, steps: int = 4, batch_size: int = 2, length: int = 96) -> Mixture:
    """Return a mixture of one source of pairs."""
    phase = Phase(
        name="pairs",
        steps=steps,
        sources=(Source(name="pairs", path=tokens, proportion=1.0, max_epochs=100),),
    )
    return Mixture(phases=(phase,), sequence_length=length, batch_size=batch_size, seed=3, packing="no_split")
