"""Metrics of an evaluation during training."""

from __future__ import annotations

import math

import pytest
from torch import nn

from koine.errors import UserError
from koine.evaluate.training_probe import BitsPerByteProbe, metrics_of
from koine.tokenizer import Tokenizer
from tests.evaluate.conftest import Uniform

RECORDS = [
    {"text": "Das Gebiet liegt nicht weit.", "language": "de", "domain": "facts"},
    {"text": "東京は日本の首都です。", "language": "ja"},
]


class Weighted(Uniform):
    """A uniform model with a parameter, which tells its device."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.scale = nn.Linear(1, 1)


def test_means_give_each_language_and_domain_the_same_weight() -> None:
    scored = {
        "overall": {"bits_per_byte": 1.1},
        "languages": {"de": {"bits_per_byte": 1.0}, "ja": {"bits_per_byte": 3.0}},
        "domains": {"web": {"bits_per_byte": 1.5}},
    }
    assert metrics_of(scored) == {
        "bits_per_byte": 1.1,
        "bits_per_byte_languages": 2.0,
        "bits_per_byte_domains": 1.5,
        "bits_per_byte/de": 1.0,
        "bits_per_byte/ja": 3.0,
        "bits_per_byte/domain/web": 1.5,
    }


def test_the_probe_measures_the_metrics_that_it_names(tokenizer: Tokenizer) -> None:
    probe = BitsPerByteProbe(tokenizer, RECORDS)
    found = probe(Weighted(512), 3)
    assert list(found) == probe.names
    tokens = len(tokenizer.encode(RECORDS[0]["text"]))
    size = len(RECORDS[0]["text"].encode())
    assert found["bits_per_byte/de"] == pytest.approx(tokens * math.log2(512) / size, rel=1e-6)
    probe.check_metric("")
    probe.check_metric("bits_per_byte/de")
    with pytest.raises(UserError, match="no metric 'bits_per_byte/fr'"):
        probe.check_metric("bits_per_byte/fr")
    with pytest.raises(UserError, match="no documents"):
        BitsPerByteProbe(tokenizer, [])
