"""Detect loss spikes, and a loss or gradient norm that is not finite, before the weights change."""

from __future__ import annotations

import math
from statistics import median

from koine.train.settings import TrainSettings

MAD_TO_DEVIATION = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class SpikeDetector:
    """Compares each loss of a phase with the recent ones."""

    def __init__(self, settings: TrainSettings, losses: list[float]) -> None:
        self.settings = settings
        self.losses = losses

    def find_problem(self, loss: float, gradient_norm: float) -> str | None:
        """Return why to stop before the optimiser's step, in a few words; None if all is well.

        A spike is a loss above the median of the last `spike_window` by more than `spike_deviations` robust
        deviations (1.4826 times the median absolute deviation) and by more than `spike_rise`. The first half
        of a window is never a spike.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the norm of the gradient is {gradient_norm}"
        settings = self.settings
        if settings.spike_deviations and len(self.losses) >= settings.spike_window // 2:
            center = median(self.losses)
            deviation = MAD_TO_DEVIATION * median(abs(value - center) for value in self.losses)
            if loss - center > max(settings.spike_rise, settings.spike_deviations * deviation):
                return f"the loss jumped to {loss:.3f} from a median of {center:.3f}"
        return None

    def add(self, loss: float) -> None:
        """Add the loss of a step that was taken."""
        self.losses.append(loss)
        del self.losses[: -self.settings.spike_window]

    def reset(self) -> None:
        """Forget all losses: a new phase has other data and another loss."""
        self.losses.clear()
