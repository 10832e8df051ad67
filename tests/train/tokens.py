"""Token shards of a few documents, as `koine data tokenize` writes them."""

from __future__ import annotations

from pathlib import Path

from koine.data import tokenize
from koine.tokenizer import train_tokenizer
from tests.data.conftest import document, write_records


def write_tokens(folder: Path) -> tuple[Path, dict[str, Path]]:
    """A tokenizer, and the shards of documents of some 15 (`short`) and 200 words (`books`)."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    texts = [document(number, 30) for number in range(200)]
    train_tokenizer({"en": lambda: texts}, vocab_size=350, english_share=None, min_frequency=2).save(
        tokenizer
    )
    shards = {}
    for name, length in (("short", 15), ("books", 200)):
        records = [
            {"id": f"{name}{number}", "text": document(number, length), "language": "en"}
            for number in range(60)
        ]
        shards[name] = folder / name
        tokenize(write_records(folder / f"{name}.jsonl", records), tokenizer, out=shards[name])
    return tokenizer, shards
