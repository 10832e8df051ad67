"""Bits per byte of text, comparable between models with different tokenizers.

    BPB = sum over tokens of -ln p / (ln 2 * bytes)

Each document is scored on its own from BOS. The end-of-document token is not scored, so the sum is that of
the text alone. The bytes are all those of the text in UTF-8 after NFC.
"""

from __future__ import annotations

import math
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from koine.errors import KoineWarning, UserError
from koine.evaluate.bootstrap import bootstrap_interval
from koine.evaluate.evaluation import Block, EvaluationSetup, format_interval
from koine.fields import check_integer

if TYPE_CHECKING:
    from koine.evaluate.log_likelihood import ScoringModel
    from koine.tokenizer import Tokenizer

# Documents are sorted by length within a chunk of this many batches: little padding, bounded memory.
_CHUNK_BATCHES = 64
_ROUND_TRIPS = 64


@dataclass(frozen=True)
class DocumentScore:
    """Negative log-likelihood (nats) and size of one document, with its language and domain."""

    nats: float
    bytes: int
    tokens: int
    language: str
    domain: str


def bits_per_byte(
    model: ScoringModel,
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    device: str = "cpu",
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure bits per byte with a bootstrap interval over documents: overall, by language, by domain.

    Args:
        model: a causal LM.
        tokenizer: the model's.
        records: with `text`, and `language` and `domain` where known (else "und" and "none").
        batch_size: documents at a time.
        max_length: tokens of a window. Longer documents are scored to their end in windows that overlap by
            half (see `log_likelihood.windows`). `None`: as many as the model's configuration allows.
        device: where the model is.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        `{"overall": {"bits_per_byte", "interval", "bytes", "documents", "tokens"}, "languages": {code:
        {...}}, "domains": {name: {...}}}`. The interval of a single document is `None`.

    Raises:
        UserError: for records without text, or no text at all.
    """
    scores = list(
        score_documents(
            model, tokenizer, records, batch_size=batch_size, max_length=max_length, device=device
        )
    )
    if not any(score.bytes for score in scores):
        raise UserError("no text to score", hint="give documents with text")

    def measure(part: list[DocumentScore]) -> dict[str, Any]:
        return _measure(part, confidence=confidence, resamples=resamples, seed=seed)

    languages: dict[str, list[DocumentScore]] = defaultdict(list)
    domains: dict[str, list[DocumentScore]] = defaultdict(list)
    for score in scores:
        languages[score.language].append(score)
        domains[score.domain].append(score)
    return {
        "overall": measure(scores),
        "languages": {code: measure(languages[code]) for code in sorted(languages)},
        "domains": {name: measure(domains[name]) for name in sorted(domains)},
    }


def score_documents(
    model: ScoringModel,
    tokenizer: Tokenizer,
    records: Iterable[Mapping[str, Any]],
    *,
    batch_size: int,
    max_length: int | None,
    device: str,
) -> Iterator[DocumentScore]:
    """Score each document that has text, in the order of `records`, reading a chunk at a time."""
    from koine.evaluate.log_likelihood import negative_log_likelihoods

    check_integer("the batch size", batch_size, low=1)
    longest = context_length(model) if max_length is None else max_length
    check_integer("the length", longest, low=2)
    stream = iter(records)
    first = True
    while chunk := list(islice(stream, batch_size * _CHUNK_BATCHES)):
        texts = [_text(record) for record in chunk]
        encoded = tokenizer.encode_batch(texts)
        if first:
            _check_round_trip(tokenizer, texts[:_ROUND_TRIPS], encoded[:_ROUND_TRIPS])
            first = False
        documents = [[tokenizer.bos_id, *ids] for ids in encoded]
        nats = negative_log_likelihoods(
            model, documents, batch_size=batch_size, max_length=longest, device=device
        )
        for record, text, ids, value in zip(chunk, texts, encoded, nats, strict=True):
            if text:
                yield DocumentScore(
                    nats=value,
                    bytes=len(text.encode("utf-8")),
                    tokens=len(ids),
                    language=str(record.get("language") or "und"),
                    domain=str(record.get("domain") or "none"),
                )


def context_length(model: Any) -> int:
    """Return the model's context length; a very large number where it has none."""
    return getattr(model, "context_length", None) or 2**31 - 1


def _text(record: Mapping[str, Any]) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise UserError(
            f"record '{record.get('id', '?')}' has no text",
            hint="give chats and questions with --questions, documents with --data",
        )
    return unicodedata.normalize("NFC", text)


def _check_round_trip(tokenizer: Tokenizer, texts: list[str], encoded: list[list[int]]) -> None:
    lost = sum(
        tokenizer.decode(ids, skip_special=False).strip() != text.strip()
        for text, ids in zip(texts, encoded, strict=True)
    )
    if lost:
        warnings.warn(
            "the tokenizer loses part of the text "
            f"({lost} of the first {len(texts)} documents do not come back): "
            "its bits per byte are too low to compare with those of a lossless tokenizer",
            KoineWarning,
            stacklevel=2,
        )


def _measure(scores: list[DocumentScore], *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    bits = [score.nats / math.log(2.0) for score in scores]
    sizes = [float(score.bytes) for score in scores]
    interval = bootstrap_interval(bits, sizes, confidence=confidence, resamples=resamples, seed=seed)
    return {
        "bits_per_byte": math.fsum(bits) / math.fsum(sizes),
        "interval": None if interval is None else list(interval),
        "bytes": sum(score.bytes for score in scores),
        "documents": len(scores),
        "tokens": sum(score.tokens for score in scores),
    }


def measure_bits(setup: EvaluationSetup, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Run `bits_per_byte` as an entry of the table of evaluations."""
    return bits_per_byte(
        setup.model,
        setup.tokenizer,
        records,
        batch_size=setup.batch_size,
        max_length=setup.max_length,
        device=setup.device,
        seed=setup.seed,
    )


def bits_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return a table: all documents, then each language, then each domain."""
    if "overall" not in result:
        return []
    entries = {
        "all": result["overall"],
        **result["languages"],
        **{f"domain {name}": entry for name, entry in result["domains"].items()},
    }
    rows = [
        [
            name,
            f"{entry['bits_per_byte']:.4f}",
            format_interval(entry["interval"], 4),
            f"{entry['bytes']:,}",
            f"{entry['documents']:,}",
            f"{entry['bytes'] / max(entry['tokens'], 1):.2f}",
        ]
        for name, entry in entries.items()
    ]
    columns = ["", "bits/byte", "95 % interval", "bytes", "documents", "bytes/token"]
    return [
        {
            "kind": "table",
            "title": "Bits per byte (lower is better)",
            "columns": columns,
            "rows": rows,
            "caption": "Bits that the model needs on average to predict one byte of the text. Intervals are 95 % "
            "bootstrap intervals over documents.",
        }
    ]
