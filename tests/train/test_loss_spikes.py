"""The rule for loss spikes, by numbers worked out by hand."""

from __future__ import annotations

import math

from koine.train import TrainSettings
from koine.train.loss_spikes import SpikeDetector


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
