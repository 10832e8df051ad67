"""Clipping, the rule for spikes and the course of the rate, by numbers that were worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from koine.train import TrainSettings
from koine.train.loss_spikes import SpikeDetector
from koine.train.optimiser import Optimiser
from koine.train.schedule import learning_rate_factor


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


def test_a_spike_is_above_both_bounds() -> None:
    """Losses 1, 2, 3, 4, 5: median 3, median absolute deviation 1, so 1.4826 is one robust deviation."""

    def found(
        loss: float, deviations: float, rise: float, losses: tuple[float, ...] = (1, 2, 3, 4, 5)
    ) -> bool:
        settings = TrainSettings(
            dtype="float32", spike_deviations=deviations, spike_rise=rise, spike_window=8
        )
        return SpikeDetector(settings, list(losses)).find_problem(loss, 1.0) is not None

    # Three deviations are 4.4478.
    assert not found(7.44, 3.0, 1.0)
    assert found(7.46, 3.0, 1.0)
    # Above the deviations, and not by the rise; above the rise, and not by the deviations.
    assert not found(7.46, 3.0, 5.0)
    assert not found(5.0, 3.0, 1.0)
    assert found(8.01, 3.0, 5.0)
    assert not found(1000.0, 0.0, 1.0), "never"
    # Half a window is known, or nothing is said.
    assert not found(100.0, 3.0, 1.0, (1, 2, 3))
    assert found(100.0, 3.0, 1.0, (1, 2, 3, 4))
    detector = SpikeDetector(TrainSettings(dtype="float32", spike_window=8), [])
    for loss in range(20):
        detector.add(float(loss))
    assert detector.losses == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0, 18.0, 19.0]
    assert SpikeDetector(TrainSettings(dtype="float32"), []).find_problem(math.inf, 1.0) == "the loss is inf"
    assert (
        SpikeDetector(TrainSettings(dtype="float32"), []).find_problem(1.0, math.nan)
        == "the norm of the gradient is nan"
    )


def test_a_stable_phase_ends_a_whole_step_early() -> None:
    """A quarter of 10 steps is 2.5: the last 3 decay, to the ratio in the last."""
    rates = [
        learning_rate_factor("wsd", step, 10, warmup_steps=2, min_ratio=0.1, decay_share=0.25)
        for step in range(10)
    ]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1])
    # A decay that would begin in the warm-up begins after it.
    rates = [learning_rate_factor("wsd", step, 4, warmup_steps=2, decay_share=1.0) for step in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0])
