"""Gradient scaling and clipping, by numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from koine.train import TrainSettings
from koine.train.optimiser import Optimiser

from .models import small_model


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        # Sums of 24 and 32 over 8 units: the mean gradient is (3, 4), of norm 5.
        (0.0, [3.0, 4.0]),
        (10.0, [3.0, 4.0]),
        (5.5, [3.0, 4.0]),
        (2.5, [1.5, 2.0]),
        (1.0, [0.6, 0.8]),
    ],
)
def test_the_mean_gradient_is_clipped(clip: float, expected: list[float]) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimiser = Optimiser(model, TrainSettings(dtype="float32"), dtype=torch.float32)
    model.weight.grad = torch.tensor([[24.0, 32.0]])
    assert optimiser.scale_and_clip(1 / 8, clip) == pytest.approx(5.0)
    assert model.weight.grad[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_every_weight_is_trained_with_and_without_weight_decay(optimiser: str, weight_decay: float) -> None:
    model = small_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    settings = TrainSettings(dtype="float32", optimiser=optimiser, weight_decay=weight_decay)  # type: ignore[arg-type]
    trained = Optimiser(model, settings, dtype=torch.float32)
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    trained.step(1e-2)
    assert [name for name, weight in model.named_parameters() if torch.equal(weight, before[name])] == []
