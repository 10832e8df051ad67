"""Bits per byte: what a model needs to write down a text, comparable between tokenizers.

    BPB = sum over tokens of -ln p / (ln 2 * bytes)

Every document is scored alone from its BOS; the end of the document is not scored, so that the sum is that of the
text and nothing else; bytes are those of the text in UTF-8 after NFC, all of them.
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

if TYPE_CHECKING:
    from koine.evaluate.log_likelihood import ScoringModel
    from koine.tokenizer import Tokenizer

# Documents are sorted by length within a stretch of this many batches: little padding, memory that does not grow.
_STRETCH = 64
_CHECKED = 64


@dataclass(frozen=True)
class DocumentScore:
    """One document: nats of its text, bytes of its text, and where it belongs."""

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
    """Bits per byte with a bootstrap interval over documents: overall, by language and by domain.

    records: with `text`, and `language` and `domain` where they are known ("und" and "none" where not).
    max_length: tokens that the model sees at once; longer documents are scored whole, in windows that overlap by half
        (see `scoring.windows`). None: as many as the model's configuration allows.
    Returns `{"overall": {"bits_per_byte", "interval", "bytes", "documents", "tokens"}, "languages": {code: {...}}, "domains":
    {name: {...}}}`; an interval is None for a single document.
    Raises `UserError` for records without text, or no text at all.
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
    """The score of each document that has any text, in the order of `records`, read a stretch at a time."""
    from koine.evaluate.log_likelihood import negative_log_likelihoods

    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}", hint="give at least 1")
    longest = context_length(model) if max_length is None else max_length
    if longest < 2:
        raise UserError(f"the length is {longest}", hint="give at least 2 tokens")
    stream = iter(records)
    first = True
    while stretch := list(islice(stream, batch_size * _STRETCH)):
        texts = [_text(record) for record in stretch]
        encoded = tokenizer.encode_batch(texts)
        if first:
            _check_round_trip(tokenizer, texts[:_CHECKED], encoded[:_CHECKED])
            first = False
        documents = [[tokenizer.bos_id, *ids] for ids in encoded]
        nats = negative_log_likelihoods(
            model, documents, batch_size=batch_size, max_length=longest, device=device
        )
        for record, text, ids, value in zip(stretch, texts, encoded, nats, strict=True):
            if text:
                yield DocumentScore(
                    nats=value,
                    bytes=len(text.encode("utf-8")),
                    tokens=len(ids),
                    language=str(record.get("language") or "und"),
                    domain=str(record.get("domain") or "none"),
                )


def context_length(model: Any) -> int:
    """Return the longest sequence that the model's configuration names."""
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
            f"the tokenizer loses part of the text ({lost} of the first {len(texts)} documents do not come back): "
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
