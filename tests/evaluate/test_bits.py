"""Bits per byte against closed forms and against the loss of `transformers`."""

from __future__ import annotations

import math
import unicodedata

import pytest
import torch

from koine.errors import UserError
from koine.evaluate import bits_per_byte
from koine.tokenizer import Tokenizer

from .conftest import Uniform, Wrapped

RECORDS = [
    {"id": "1", "text": "Das Gebiet liegt nicht weit.", "language": "de", "domain": "facts"},
    {"id": "2", "text": "東京は日本の首都です。" * 6, "language": "ja", "domain": "facts"},
    {"id": "3", "text": "e\u0301" * 40, "language": "fr", "domain": "marks"},
    {"id": "4", "text": "x", "language": "de", "domain": "marks"},
    {"id": "5", "text": "Weit weg, nicht nah." * 9, "language": "de"},
]


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(tokenizer: Tokenizer) -> None:
    result = bits_per_byte(Uniform(1000), tokenizer, RECORDS, batch_size=2)
    for code in ("de", "ja", "fr"):
        texts = [unicodedata.normalize("NFC", r["text"]) for r in RECORDS if r["language"] == code]
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        measured = result["languages"][code]
        assert (measured["bytes"], measured["tokens"], measured["documents"]) == (size, tokens, len(texts))
        # float32 log-softmax: a relative error of 1e-6
        assert measured["bits_per_byte"] == pytest.approx(tokens * math.log2(1000) / size, rel=1e-6)
    assert set(result["domains"]) == {"facts", "marks", "none"}
    assert result["overall"]["documents"] == 5
    assert result["languages"]["ja"]["interval"] is None


def test_the_sum_is_the_loss_of_transformers(tokenizer: Tokenizer, llama: Wrapped) -> None:
    nats = size = 0.0
    for record in RECORDS:
        text = unicodedata.normalize("NFC", record["text"])
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
        with torch.no_grad():
            nats += float(llama.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        size += len(text.encode())
    value = bits_per_byte(llama, tokenizer, RECORDS, batch_size=3)["overall"]["bits_per_byte"]
    # float32 sums in another order
    assert value == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_scores_do_not_depend_on_the_batch_size(tokenizer: Tokenizer, llama: Wrapped) -> None:
    results = [bits_per_byte(llama, tokenizer, RECORDS, batch_size=size) for size in (1, 2, 5)]
    for result in results[1:]:
        for code, entry in result["languages"].items():
            # matrix products of another shape round differently in float32
            expected = results[0]["languages"][code]["bits_per_byte"]
            assert entry["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_logits_in_parts_are_the_same(
    tokenizer: Tokenizer, llama: Wrapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bits_per_byte(llama, tokenizer, RECORDS)
    monkeypatch.setattr("koine.evaluate.log_likelihood._LOGITS", {"cpu": 7 * tokenizer.vocab_size})
    parts = bits_per_byte(llama, tokenizer, RECORDS)
    assert parts["overall"]["bits_per_byte"] == pytest.approx(whole["overall"]["bits_per_byte"], rel=1e-5)


def test_long_documents_are_scored_to_the_end(tokenizer: Tokenizer) -> None:
    """A uniform model cannot tell the windows apart, so every token must be counted once."""
    whole = bits_per_byte(Uniform(400), tokenizer, RECORDS)["overall"]
    for length in (2, 3, 16, 17):
        cut = bits_per_byte(Uniform(400), tokenizer, RECORDS, max_length=length)["overall"]
        assert cut["bits_per_byte"] == pytest.approx(whole["bits_per_byte"], rel=1e-6)
        assert cut["bytes"] == whole["bytes"]


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([], {}, "no text to score"),
        ([{"id": "q7", "messages": []}], {}, "'q7' has no text; give chats and questions with --questions"),
        (RECORDS, {"batch_size": 0}, "batch size is 0"),
        (RECORDS, {"max_length": 1}, "length is 1"),
    ],
)
def test_records_without_text_and_wrong_numbers_raise_a_user_error(
    tokenizer: Tokenizer, records: list, options: dict, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        bits_per_byte(Uniform(400), tokenizer, records, **options)
