"""Stages of RoPE to NoPE: the theta of each stage, and scores of answers by hand."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.rope_to_nope import needles, stages
from koine.model import Decoder, ModelConfig, save_model, variant_layers
from koine.plan import Plan

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "rope_to_nope"

# arXiv 2501.18795, table 5: the second stage's theta of each arm; all have 10,000 in the first.
SECOND = {
    "rope": 2e6,
    "qk-norm": 2e6,
    "nope": 1e4,
    "rnope-10k": 1e4,
    "rnope-100k": 1e5,
    "rnope-2m": 2e6,
    "rnope-4m": 4e6,
    "swa-1": 1e4,
    "swa-3": 1e4,
    "swa-7": 1e4,
}


def test_the_plan_gives_each_stage_its_theta(tmp_path: Path) -> None:
    module = import_module("experiments.rope_to_nope.plan")
    (tmp_path / "pack" / "text").mkdir(parents=True)
    (tmp_path / "pack" / "text" / "en_books.jsonl.xz").write_bytes(b"")
    plan = Plan("x", tmp_path)
    module.rope_to_nope(plan, pack=tmp_path / "pack", scale="laptop")
    thetas: dict[str, set[float]] = {}
    for name, node in plan.nodes.items():
        stage, _, rest = name.partition("/")
        if stage == "short":
            assert node.parameters["theta"] == 1e4, name
        if stage == "long":
            thetas.setdefault(rest.split("/")[0], set()).add(node.parameters["theta"])
    assert thetas == {arm: {SECOND[arm]} for arm in module.SCALES["laptop"].arms}


def test_the_second_stage_rotates_with_its_own_theta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is trained has the first stage's weights and the second stage's theta."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_heads=1,
        num_kv_heads=1,
        head_dim=16,
        layers=variant_layers("rope", 2),
        rope_theta=1e4,
    )
    torch.manual_seed(0)
    first = Decoder(config)
    save_model(first, tmp_path / "short")
    trained: list[tuple[Any, ...]] = []
    monkeypatch.setattr(stages, "_train", lambda model, *rest: trained.append((model, *rest)))
    monkeypatch.setattr(stages, "_measure_short", lambda *_: {})
    monkeypatch.setattr(stages, "_attention", lambda *_: [])
    (tmp_path / "long").mkdir()
    stages.extend(
        tmp_path,
        tmp_path,
        tmp_path / "short",
        theta=2e6,
        num_layers=2,
        hidden=16,
        intermediate=16,
        heads=1,
        kv_heads=1,
        window=8,
        short=128,
        long=1024,
        steps=5,
        tokens_per_step=1024,
        learning_rate=1e-3,
        prompts=1,
        attention_prompts=1,
        seed=0,
        threads=1,
        dtype="float32",
        out=tmp_path / "long",
    )
    [(model, _, phases, length, *_)] = trained
    assert model.config.rope_theta == 2e6
    assert all(block.config.rope_theta == 2e6 for block in model.blocks)
    for name, tensor in first.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    # Three short texts of 128 tokens for each long one of 1,024: 384 of 1,408 tokens are of short ones.
    assert (length, phases[0][1]) == (1024, 5)
    assert phases[0][0] == pytest.approx({"short": 384 / 1408, "long": 1024 / 1408})
    tokens = torch.randint(0, 64, (1, 40))
    with torch.no_grad():
        assert not torch.allclose(model(tokens), first(tokens))
        again = Decoder(config)
        again.load_state_dict(first.state_dict())
        assert torch.equal(again(tokens), first(tokens))


class _Table(nn.Module):
    """Logits that are read from a table by the position that predicts: `[time, vocab]`."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.output_weight = table

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.arange(tokens.shape[1])[None]

    def logits(self, positions: Tensor) -> Tensor:
        return self.table[positions]


def test_answers_are_scored_by_the_position_before_each_token() -> None:
    """Scores are means over tokens, then over questions: here one is right, one half right."""
    tokens = [5, 1, 2, 3, 6, 0, 4, 7]
    table = torch.zeros(8, 8)
    # Positions 1 and 2 predict the tokens at 2 and 3; 5 and 6 those at 6 and 7.
    for place, token, logit in ((1, 2, 2.0), (2, 3, 1.0), (5, 4, 3.0), (6, 1, 1.0)):
        table[place, token] = logit
    prompt = needles.Prompt(
        tokens,
        [(range(1, 2), range(2, 4), range(1)), (range(5, 6), range(6, 8), range(1))],
    )

    def chosen(logit: float) -> float:
        return logit - math.log(math.exp(logit) + 7)

    found = stages.answer_scores(_Table(table), [prompt])  # type: ignore[arg-type]
    missed = -math.log(math.exp(1.0) + 7)
    first, second = (chosen(2.0) + chosen(1.0)) / 2, (chosen(3.0) + missed) / 2
    assert found["accuracy"] == 0.5
    assert found["log_probability"] == pytest.approx((first + second) / 2, rel=1e-5)
