"""Bits per byte on a few documents during training; its metrics can choose the best checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from koine.errors import UserError
from koine.evaluate.bits import bits_per_byte
from koine.train.evaluation import check_metric

if TYPE_CHECKING:
    from koine.model.language_model import LanguageModel
    from koine.tokenizer import Tokenizer

OVERALL = "bits_per_byte"
OF_LANGUAGES = "bits_per_byte_languages"
OF_DOMAINS = "bits_per_byte_domains"


class BitsPerByteProbe:
    """An `evaluate` function for the training loop; returns `metrics_of`. Documents stay in memory."""

    def __init__(self, tokenizer: Tokenizer, records: Iterable[Mapping[str, Any]]) -> None:
        self.tokenizer = tokenizer
        self.records = list(records)
        if not any("text" in record for record in self.records):
            raise UserError("the evaluation has no documents", hint="give records with text")

    @property
    def names(self) -> list[str]:
        """Names of the metrics that it measures."""
        codes = {str(record.get("language") or "und") for record in self.records}
        domains = {str(record.get("domain") or "none") for record in self.records}
        return [
            OVERALL, OF_LANGUAGES, OF_DOMAINS,
            *(f"{OVERALL}/{code}" for code in sorted(codes)),
            *(f"{OVERALL}/domain/{name}" for name in sorted(domains)),
        ]  # fmt: skip

    def check_metric(self, name: str) -> None:
        """Raise `UserError` for a metric that it does not measure; "" is the first."""
        check_metric(name, self.names)

    def identity(self) -> dict[str, Any]:
        """Return the digest of the documents and that of the tokenizer."""
        content = json.dumps(self.records, sort_keys=True, default=str)
        return {
            "documents": "sha256:" + hashlib.sha256(content.encode()).hexdigest(),
            "tokenizer": self.tokenizer.fingerprint,
        }

    def __call__(self, model: LanguageModel, done: int) -> dict[str, float]:
        device = str(next(model.parameters()).device)
        scored = bits_per_byte(model, self.tokenizer, self.records, device=device, resamples=1)
        return metrics_of(scored)


def metrics_of(scored: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a result of `koine.evaluate.bits_per_byte`.

    `bits_per_byte` is over all bytes. `bits_per_byte_languages` and `bits_per_byte_domains` are means in
    which each language or domain has the same weight. Then follow each language (`bits_per_byte/de`) and each
    domain (`bits_per_byte/domain/web`).
    """

    def value(entry: Mapping[str, Any]) -> float:
        return float(entry["bits_per_byte"])

    languages = {code: value(entry) for code, entry in scored["languages"].items()}
    domains = {name: value(entry) for name, entry in scored["domains"].items()}
    return {
        OVERALL: value(scored["overall"]),
        OF_LANGUAGES: sum(languages.values()) / len(languages),
        OF_DOMAINS: sum(domains.values()) / len(domains),
        **{f"{OVERALL}/{code}": bits for code, bits in languages.items()},
        **{f"{OVERALL}/domain/{name}": bits for name, bits in domains.items()},
    }
