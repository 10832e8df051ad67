"""Bits per byte of old text before and after a vocabulary extension, without any training.

The method's guarantee: the logits of old tokens stay. A new token only adds to the denominator of the softmax.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koine.evaluate import bits_per_byte
from koine.model import Decoder, load_model
from koine.model.adapt import move_model
from koine.model.adapt.vocabulary_transfer import match_tokenizers
from koine.tokenizer import Tokenizer, load_tokenizer
from koine.tokenizer.extend import extend_tokenizer
from tests.model.adapt.conftest import GERMAN, KOREAN, trained
from tests.model.families.cases import first_case

transformers = pytest.importorskip("transformers", reason="the comparison needs the extra [hf]")

FAMILIES = ("llama", "gemma2", "gemma3_text", "cohere2")
"""Untied and tied heads, an embedding multiplier, a soft-cap on the logits."""
RECORDS = [{"text": line} for line in GERMAN[:12]]


class OldTokensOnly(nn.Module):
    """A model that cannot choose new tokens."""

    def __init__(self, model: Decoder, new: Tensor) -> None:
        super().__init__()
        self.inner, self.new, self.context_length = model, new, model.context_length

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.inner(tokens)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.inner.logits(hidden).index_fill(-1, self.new, -math.inf)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    """A German tokenizer, and the folder of one with Korean tokens more."""
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer = trained(GERMAN, 330)
    tokenizer.save(root / "old")
    extend_tokenizer(root / "old", ((line, 1) for line in KOREAN), new_tokens=12).tokenizer.save(
        root / "longer"
    )
    return tokenizer, root / "longer"


def overall(model: Any, tokenizer: Tokenizer) -> float:
    found: float = bits_per_byte(model, tokenizer, RECORDS)["overall"]["bits_per_byte"]
    return found


def added_by_new_tokens(folder: Path, tokenizer: Tokenizer, new: Tensor) -> float:
    """Return by how much new tokens raise the bits per byte, from the logits of the class of `transformers`.

    A token of probability p among the old ones has p / (1 + r), where r is the mass of the new ones over that of
    the old ones.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    bits, size = 0.0, 0
    for record in RECORDS:
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(record["text"])]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        old = logits.index_fill(-1, new, -math.inf)
        bits += float((logits.logsumexp(-1) - old.logsumexp(-1)).sum()) / math.log(2)
        size += len(record["text"].encode())
    return bits / size


@pytest.mark.parametrize("model_type", FAMILIES)
def test_old_text_costs_what_it_did_but_for_the_mass_of_new_tokens(
    model_type: str, tokenizers: tuple[Tokenizer, Path], tmp_path: Path
) -> None:
    from tests.model.families.reference import write_checkpoint

    tokenizer, longer = tokenizers
    case = first_case(model_type)
    given = write_checkpoint(
        replace(case, changes={**case.changes, "vocab_size": tokenizer.vocab_size}), tmp_path / "given"
    )
    tokenizer.save(given)
    move_model(given, longer, tmp_path / "moved")
    before = overall(load_model(given), tokenizer)
    moved, extended = load_model(tmp_path / "moved"), load_tokenizer(tmp_path / "moved")
    shared = match_tokenizers(given, tmp_path / "moved").shared
    new = torch.tensor([index for index in range(extended.vocab_size) if index not in shared])
    assert len(new) == 12
    # float32 sums in another order
    assert overall(OldTokensOnly(moved, new), extended) == pytest.approx(before, rel=1e-6)
    added = added_by_new_tokens(tmp_path / "moved", extended, new)
    assert added > 1e-3
    assert overall(moved, extended) == pytest.approx(before + added, rel=1e-6)
