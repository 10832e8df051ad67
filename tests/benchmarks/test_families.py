"""What benchmarks/families.py divides by: operations of a step, and rounds without disturbance."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from families_training import training_flops
from peers.turns import Turn, compare_sides

transformers = pytest.importorskip("transformers")


def test_operations_of_a_step_are_those_that_torch_counts() -> None:
    """Torch counts attention over the whole square, of which a causal one needs half."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).train()
    model.set_attn_implementation("eager")
    batch, length = 3, 16
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 64, (batch, length)), use_cache=False).logits.sum().backward()
    other_half = batch * length * 2 * 6 * length * 32
    assert training_flops(config.to_dict(), batch, length) == counter.get_total_flops() - other_half


def test_a_round_beside_a_slow_probe_is_dropped() -> None:
    quiet = {"ours": Turn(1.0, 95.0, 100.0), "peer": Turn(2.0, 96.0, 100.0)}
    disturbed = {"ours": Turn(5.0, 30.0, 100.0), "peer": Turn(2.0, 96.0, 100.0)}
    result = compare_sides([quiet, quiet, disturbed, quiet])
    assert result["kept"] == 3
    assert result["ratio"] == {"peer": [2.0, 2.0, 2.0]}
    assert result["seconds"] == {"ours": 1.0, "peer": 2.0}
    assert result["ceiling"] == {"ours": 100.0, "peer": 100.0}


def test_a_machine_that_is_never_quiet_keeps_all_rounds() -> None:
    rounds = [
        {"ours": Turn(1.0, probe, 100.0), "peer": Turn(3.0, probe, 100.0)} for probe in (10.0, 50.0, 90.0)
    ]
    assert compare_sides(rounds)["kept"] == 3
