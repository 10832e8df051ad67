"""A mixture's router losses: their formulas, their place in the loss, and what they do in a training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from koine.model import Decoder, load_model
from koine.model.config import MixtureConfig
from koine.model.routers import Routing
from koine.train import TrainSettings, language_modelling, train
from koine.train.routing import router_loss

from .fakes import fake_order
from .models import small_config

MIXTURE = MixtureConfig(
    experts=("a", "b", "c"), attention="kv-experts", load_balancing=0.02, z_loss=0.003, top_k=2
)


def mixture_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(replace(small_config(), mixture=MIXTURE))


def test_the_papers_formulas_by_hand() -> None:
    """L_LB = N sum f_i P_i over the choices that count, L_z the mean square of the logarithm of the sum, both summed over layers and routers."""
    logits = torch.randn(1, 4, 3)
    probabilities = logits.softmax(-1)
    chosen = probabilities.topk(2, dim=-1).indices
    attention = torch.randn(1, 4, 3)
    counted = torch.tensor([[True, True, True, False]])
    routing = Routing(logits, probabilities, chosen, attention)
    loss, metrics = router_loss([routing, routing], MIXTURE, counted)
    share = torch.tensor([float((chosen[0, :3] == expert).sum()) / 6 for expert in range(3)])
    balance = 3 * float((share * probabilities[0, :3].mean(0)).sum())
    z = sum(float(one[0, :3].exp().sum(-1).log().square().mean()) for one in (logits, attention))
    assert metrics["load_balancing_loss"] == pytest.approx(balance, rel=1e-5)
    assert metrics["router_z_loss"] == pytest.approx(z, rel=1e-5)
    assert float(loss) == pytest.approx(2 * (0.02 * balance + 0.003 * z), rel=1e-5)


def test_the_objective_adds_them_once_a_unit(tmp_path: Path) -> None:
    model = mixture_model()
    batch = fake_order(tmp_path, steps=(1,)).batch(0)
    with_losses, metrics = language_modelling(model, batch)
    model.config = replace(model.config, mixture=replace(MIXTURE, load_balancing=0.0, z_loss=0.0))
    without, _ = language_modelling(model, batch)
    units = metrics["units"]
    expected = 2 * (0.02 * metrics["load_balancing_loss"] / units + 0.003 * metrics["router_z_loss"] / units)
    assert float(with_losses - without) / units == pytest.approx(expected, rel=1e-3)


def test_a_training_shows_them_and_learns(tmp_path: Path) -> None:
    settings = TrainSettings(dtype="bfloat16", threads=1, learning_rate=1e-2, schedule="constant")
    train(
        mixture_model(),
        language_modelling,
        fake_order(tmp_path / "s", steps=(12,)),
        settings,
        out=tmp_path / "out",
        progress=False,
        device="cpu",
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # 1 where every expert has the same share and the same probability; 3 where one has all.
    assert all(0.9 < line["load_balancing_loss"] < 3.0 for line in lines)
    before, after = mixture_model(), load_model(tmp_path / "out")
    for name, parameter in after.named_parameters():
        assert not torch.equal(parameter, before.get_parameter(name)), name
