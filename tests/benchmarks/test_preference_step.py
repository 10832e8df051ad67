"""What benchmarks/preference_step.py feeds both sides with and divides by; batches without padding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from preference_step import check_same_loss, pair_flops
from preference_step_data import Pair, choose, describe, write_tokens
from preference_step_side import micro_batches, order_of, rows_of_epoch

from koine.align import completion_log_probabilities
from koine.align.log_probabilities import _ChunkedLogProbabilities
from koine.data.groups import GroupBatch
from koine.model import Decoder, ModelConfig
from koine.model.config import hybrid_layers
from tests.train.models import small_model

VOCABULARY = 64
PAIRS = [
    Pair([5, 6, 7, 8, 9], [10, 11], [12, 13, 14]),
    Pair([15], [16, 17, 18, 19], [20]),
    Pair(list(range(21, 33)), [33, 34, 35, 36, 37], [38, 39]),
]


def batch_of_pairs(folder: Path, row: int = 16) -> GroupBatch:
    """Return one batch with all pairs, two of which share a row with padding."""
    write_tokens(PAIRS, folder, VOCABULARY)
    rows = rows_of_epoch(folder, row)
    batch: GroupBatch = order_of(folder, row, rows).batch(0)
    return batch


def test_the_order_has_the_pairs_that_trl_gets(tmp_path: Path) -> None:
    batch = batch_of_pairs(tmp_path / "tokens", 24)
    found = set()
    for segment in batch.segments:
        ids = batch.tokens[segment.row, segment.start : segment.start + segment.length].tolist()
        found.add((batch.groups[segment.group].record_id, tuple(ids)))
    expected = {
        (f"pair.{number}", tuple(ids)) for number, pair in enumerate(PAIRS) for ids in pair._asdict().values()
    }
    assert found == expected
    assert len(batch.groups) == len(PAIRS)
    assert json.loads(json.dumps(describe(PAIRS, VOCABULARY)))["tokens"] == sum(
        len(ids) for _, ids in expected
    )


def test_chosen_pairs_have_the_lengths_of_all() -> None:
    pairs = [Pair([1] * length, [2], [3]) for length in range(1, 101)]
    lengths = sorted(len(pair.prompt) for pair in choose(pairs, 10))
    assert lengths == [6, 16, 26, 36, 46, 56, 66, 76, 86, 96]


@pytest.mark.parametrize(("rows", "steps", "most"), [(57, 8, 4), (12, 8, 4), (8, 8, 1), (16, 2, 8)])
def test_an_epoch_has_each_row_once(rows: int, steps: int, most: int) -> None:
    plan = micro_batches(rows, steps, most)
    assert [row for parts in plan for part in parts for row in range(rows)[part]] == list(range(rows))
    assert len(plan) == steps
    assert all(1 <= part.stop - part.start <= most for parts in plan for part in parts)


def test_operations_are_those_that_torch_counts() -> None:
    """Torch counts the whole square of attention scores, of which a causal one needs the lower half."""
    transformers = pytest.importorskip("transformers")
    length, hidden, queries, layers = 16, 32, 64, 2
    peer = transformers.Cohere2ForCausalLM(
        transformers.Cohere2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=64,
        )
    )
    peer.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        peer(torch.randint(0, VOCABULARY, (1, length)), use_cache=False).logits.sum().backward()
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layers=hybrid_layers(layers, window=64, full_every=2),
    )
    other_half = layers * 12 * queries * length * (length - 1) // 2
    head_of_prompt = 6 * 3 * hidden * VOCABULARY
    assert pair_flops(config, 3, [length - 3]) == counter.get_total_flops() - other_half - head_of_prompt
    # A second completion adds its own tokens, and attention to the prompt.
    once, twice = (pair_flops(config, 3, [5] * count) for count in (1, 2))
    assert once < twice < 2 * once


def test_different_losses_are_refused() -> None:
    def tried(loss: float) -> list[dict[str, object]]:
        return [{"identity": {"dtype": "float32"}, "first_loss": loss}]

    assert check_same_loss({"ours": tried(0.7), "trl": tried(0.70001)})["float32"] == pytest.approx(
        1.4e-5, 0.1
    )
    with pytest.raises(RuntimeError, match="the same loss"):
        check_same_loss({"ours": tried(0.7), "trl": tried(0.71)})
    with pytest.raises(RuntimeError, match="no first loss"):
        check_same_loss({"ours": tried(0.7), "trl": []})


def gradients_of(model: Decoder, sums: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (sums * torch.linspace(-1.0, 1.5, len(sums))).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_a_batch_without_padding_has_the_same_values(tmp_path: Path) -> None:
    padded = batch_of_pairs(tmp_path / "tokens", 24)
    packed = padded.without_padding()
    assert packed.tokens.shape == (1, sum(pair.tokens for pair in PAIRS))
    assert (padded.document_ids < 0).any()
    assert packed.without_padding() is packed
    assert torch.equal(packed.tokens.flatten()[packed.predicted_at], packed.predicted)
    model = small_model()
    found = completion_log_probabilities(model, padded)
    gradients = gradients_of(model, found.sums)
    apart = completion_log_probabilities(model, padded.separate())
    torch.testing.assert_close(found.sums, apart.sums, rtol=1e-5, atol=1e-5)
    expected = gradients_of(model, apart.sums)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept_bytes", [0, 2 * 3 * 11 * 8, 2**20])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_kept_probabilities_change_no_gradient(kept_bytes: int, softcap: float | None) -> None:
    """No chunk, two of three chunks and all chunks are kept; the gradients are finite differences."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 5, dtype=torch.float64, generator=generator).requires_grad_() for rows in (8, 11)
    )
    targets = torch.tensor([0, 10, 3, 3, 7, 1, 2, 9])

    def log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = _ChunkedLogProbabilities.apply(hidden, weight, targets, 0.7, softcap, 3, kept_bytes)
        return found

    # A second backward pass computes again what was kept for the first, and rounds otherwise.
    assert torch.autograd.gradcheck(log_probabilities, (hidden, weight), nondet_tol=1e-12)
