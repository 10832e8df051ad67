"""A small tokenizer, labelled answers, and a model that knows the tokenizer's ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from koine.data import Mixture, Phase, Source, tokenize
from koine.model.decoder import Decoder
from koine.tokenizer import train_tokenizer
from tests.data.conftest import document, write_records
from tests.train.models import small_config

VOCABULARY = 350


def write_tokenizer(out: Path) -> Path:
    """Train a tokenizer with our chat template."""
    out.mkdir(parents=True)
    texts = [document(number, 30) for number in range(200)]
    train_tokenizer({"en": lambda: texts}, vocab_size=VOCABULARY, english_share=None, min_frequency=2).save(
        out
    )
    return out


def model_of(seed: int = 0) -> Decoder:
    """Return a model with random weights, large enough that its answers differ."""
    torch.manual_seed(seed)
    model = Decoder(small_config(VOCABULARY))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
    return model


def labelled_records(count: int) -> list[dict[str, Any]]:
    """Return prompts with one answer each, every second one good."""
    return [
        {
            "id": f"r{number}",
            "language": ("en", "de")[number % 2],
            "prompt": document(number, 3 + number % 4),
            "completion": document(number + 50, 2 + number % 5),
            "label": number % 2 == 0,
        }
        for number in range(count)
    ]


def write_labelled(folder: Path, tokenizer: Path, count: int = 12) -> Path:
    """Tokenize labelled records."""
    records = write_records(folder / "labelled.jsonl", labelled_records(count))
    tokenize(records, tokenizer, out=folder / "labelled", kind="labelled")
    return folder / "labelled"


def mixture_of(tokens: Path, *, steps: int = 3, batch_size: int = 4, sequence_length: int = 48) -> Mixture:
    """Return a mixture of one source of groups."""
    source = Source(name="groups", path=tokens, proportion=1.0, max_epochs=100)
    return Mixture(
        phases=(Phase(name="align", steps=steps, sources=(source,)),),
        sequence_length=sequence_length,
        batch_size=batch_size,
        packing="no_split",
    )
