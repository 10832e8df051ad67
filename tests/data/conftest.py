from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koine.tokenizer import train_tokenizer

WORDS = [
    "the",
    "river",
    "runs",
    "down",
    "to",
    "the",
    "sea",
    "and",
    "back",
    "again",
    "over",
    "old",
    "stones",
    "der",
    "Fluss",
    "fließt",
    "zum",
    "Meer",
    "über",
    "Steine",
]


def document(number: int, length: int = 12) -> str:
    """Return a text that differs for every number."""
    return (
        " ".join(WORDS[(number * 7 + index * index) % len(WORDS)] for index in range(length)) + f" {number}"
    )


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    texts: dict[str, Callable[[], list[str]]] = {"en": lambda: [document(n, 30) for n in range(200)]}
    out.mkdir()
    train_tokenizer(texts, vocab_size=350, english_share=None, min_frequency=2).save(out)
    return out
