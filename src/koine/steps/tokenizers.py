"""The steps around tokenizers: train one, tokenize a corpus with it, move a model to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from koine.files import write_json
from koine.plan import step
from koine.steps import checks, estimates
from koine.steps.corpus_files import existing, load_roles, read_lines, write_step_report

if TYPE_CHECKING:
    from koine.tokenizer.weights import BucketMass, Scheme


TRANSFER_DOCUMENTS = 60
"""Documents of each language from which a vocabulary transfer learns."""


@step(
    version="1",
    estimate=estimates.tokenizer,
    check=checks.tokenizer,
    threads=2,
    formerly=("koine.recipes.tokens:build_tokenizer",),
)
def build_tokenizer(
    corpus: Path,
    *,
    scope: str,
    vocabulary_size: int,
    scheme: str,
    english_share: float,
    sample_bytes: int,
    seed: int,
    bucket_mass: str = "uniform",
    out: Path,
) -> None:
    """Train a byte-level BPE on the languages of `scope`: `universal` (all) or `cluster` (primary ones)."""
    from koine.tokenizer import train_tokenizer

    roles = load_roles(corpus)
    codes = roles.all if scope == "universal" else roles.primary
    texts = {code: partial(_texts, path) for code, path in existing(corpus, "documents", codes).items()}
    tokenizer = train_tokenizer(
        texts,
        vocab_size=vocabulary_size,
        scheme=cast("Scheme", scheme),
        bucket_mass=cast("BucketMass", bucket_mass),
        english_share=english_share if "en" in texts and len(texts) > 1 else None,
        sample_bytes=sample_bytes,
        seed=seed,
    )
    tokenizer.save(out)
    rows: list[list[str | float]] = []
    for code, path in existing(corpus, "documents-heldout", roles.all).items():
        size, count = 0, 0
        for record in read_lines(path):
            size += len(record["text"].encode("utf-8"))
            count += len(tokenizer.encode(record["text"]))
        rows.append([code, "yes" if code in texts else "no", round(size / count, 3)])
    write_json(out / "bytes_per_token.json", {str(row[0]): row[2] for row in rows})
    write_step_report(
        out,
        f"Tokenizer: {scope}",
        [
            {
                "kind": "text",
                "text": f"{tokenizer.vocab_size} tokens from {len(texts)} languages. "
                "More bytes per token mean shorter sequences.",
            },
            {
                "kind": "bars",
                "categories": [str(row[0]) for row in rows],
                "series": [{"name": "bytes per token, held-out text", "values": [row[2] for row in rows]}],
                "x_label": "language",
                "y_label": "bytes per token",
            },
        ],
    )


def _texts(path: Path) -> Iterator[str]:
    for record in read_lines(path):
        yield record["text"]


@step(
    version="1",
    estimate=estimates.tokens,
    check=checks.tokens,
    formerly=("koine.recipes.tokens:tokenize_part",),
)
def tokenize_part(corpus: Path, tokenizer: Path, *, part: str, domain: str, out: Path) -> None:
    """Tokenize one part of a corpus (`documents`, `questions/train`, `code.jsonl`) into token shards."""
    from koine.data import tokenize

    shutil.rmtree(out / "tokens", ignore_errors=True)
    tokenize(corpus / part, tokenizer, out=out / "tokens", workers=1, domain=domain, max_bad_share=0.0)


@step(
    version="2",
    estimate=estimates.mixing,
    check=checks.moved,
    formerly=("koine.recipes.regimes:move_to_tokenizer",),
)
def move_to_tokenizer(
    model: Path,
    tokenizer: Path,
    corpus: Path,
    *,
    method: str,
    languages: tuple[str, ...],
    seed: int,
    out: Path,
) -> None:
    """Give a model another tokenizer: the baselines of arXiv 2506.10766 and later methods.

    Args:
        model: folder of the model.
        tokenizer: folder of the new tokenizer.
        corpus: folder of the corpus from whose text `focus` and `distill` learn.
        method: how the rows of new tokens are initialised (`koine.model.adapt.vocabulary_transfer`).
        languages: languages whose text is used; empty: all of the corpus.
        seed: random seed of the method.
    """
    from koine.model.adapt.vocabulary_transfer import TEXT_METHODS, write_moved_model

    texts = None
    if method in TEXT_METHODS:
        paths = existing(corpus, "documents", languages or load_roles(corpus).all).values()
        texts = [
            record["text"]
            for path in paths
            for record, _ in zip(read_lines(path), range(TRANSFER_DOCUMENTS), strict=False)
        ]
    moved = write_moved_model(model, tokenizer, out, method=method, texts=texts, seed=seed)  # type: ignore[arg-type]
    write_json(
        out / "metrics.json", {"shared": moved.shared, "spelled": moved.spelled, "dropped": moved.dropped}
    )
