"""What must stop a training before it spoils the weights: a loss or gradient that is no number, and a spike."""

from __future__ import annotations

import math
from statistics import median

from koine.train.settings import TrainSettings

MAD_TO_DEVIATION = 1.4826  # of a normal distribution


class Watch:
    """The recent losses of a phase, and the rule that judges the next one."""

    def __init__(self, settings: TrainSettings, losses: list[float]) -> None:
        self.settings = settings
        self.losses = losses

    def trouble(self, loss: float, gradient_norm: float) -> str | None:
        """Why to stop before the optimiser's step, in a few words; None where all is well.

        A spike is a loss above the median of the last `spike_window` by more than `spike_deviations` robust deviations (1.4826
        times the median absolute deviation) and by more than `spike_rise`; it is looked for once half a window is known.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the norm of the gradient is {gradient_norm}"
        settings = self.settings
        if settings.spike_deviations and len(self.losses) >= settings.spike_window // 2:
            middle = median(self.losses)
            deviation = MAD_TO_DEVIATION * median(abs(value - middle) for value in self.losses)
            if loss - middle > max(settings.spike_rise, settings.spike_deviations * deviation):
                return f"the loss jumped to {loss:.3f} from a median of {middle:.3f}"
        return None

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        del self.losses[: -self.settings.spike_window]

    def new_phase(self) -> None:
        """Other data, another loss: forget."""
        self.losses.clear()
