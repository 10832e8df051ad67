"""Loss per position against transformers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from koine.errors import UserError
from koine.evaluate.long_context.positions import bin_edges, long_documents, loss_by_position, token_losses
from tests.evaluate.conftest import Uniform, Wrapped


def test_bins_cover_every_prediction() -> None:
    for length in (5, 8, 9, 100, 511, 2047):
        edges = bin_edges(length)
        assert edges[0] == 0
        assert edges[-1] == length
        assert edges == sorted(set(edges))
    assert bin_edges(100) == [0, 8, 12, 16, 24, 32, 48, 64, 96, 100]


def test_losses_are_those_of_transformers(llama: Wrapped) -> None:
    torch.manual_seed(0)
    documents = torch.randint(10, 300, (3, 65)).tolist()
    with torch.no_grad():
        expected = [
            float(llama.model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in documents
        ]
    assert [sum(token_losses(llama, ids)) / 64 for ids in documents] == pytest.approx(expected, abs=1e-5)
    found = loss_by_position(llama, documents, token_bytes=lambda token: 2, lengths=[33, 65])
    assert found["lengths"]["65"]["nats_per_token"] == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert found["lengths"]["65"]["bits_per_byte"] == pytest.approx(
        sum(expected) / 3 / math.log(2) / 2, abs=1e-5
    )
    weighted = sum(one["nats_per_token"] * (one["end"] - one["start"]) for one in found["bins"]) / 64
    assert weighted == pytest.approx(sum(expected) / 3, abs=1e-5)
    assert (
        found["bins"][0]["interval"][0] < found["bins"][0]["nats_per_token"] < found["bins"][0]["interval"][1]
    )


def test_a_uniform_model_loses_the_same_everywhere() -> None:
    found = loss_by_position(Uniform(50), [list(range(40))], token_bytes=lambda token: 1, lengths=[40])
    assert {round(one["nats_per_token"], 6) for one in found["bins"]} == {round(math.log(50), 6)}
    assert {one["interval"] for one in found["bins"]} == {None}
    with pytest.raises(UserError, match="a document has 40 tokens"):
        loss_by_position(Uniform(50), [list(range(40))], token_bytes=lambda token: 1, lengths=[64])


def test_long_documents() -> None:
    def encode(text: str) -> list[int]:
        return [ord(character) for character in text]

    whole, joined = long_documents(["a" * 25, "b" * 5, "c" * 9], encode, bos=1, length=10, count=3)
    assert not joined
    assert [bytes(one).decode() for one in whole] == ["\1" + "a" * 9, "\1" + "a" * 9, "\1" + "c" * 9]
    short, joined = long_documents(["abc"] * 6, encode, bos=1, length=10, count=2)
    assert joined
    assert bytes(short[0]).decode() == "\1abc\n\nabc\n"
