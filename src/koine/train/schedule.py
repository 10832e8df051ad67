"""Learning rate schedules: a pure function of the step inside its phase."""

from __future__ import annotations

import math

from koine.train.settings import Schedule


def learning_rate_factor(
    schedule: Schedule,
    step: int,
    steps: int,
    *,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_share: float = 0.2,
) -> float:
    """Return the factor on the peak learning rate at `step` (0 is the first) of a phase of `steps`.

    Warm-up reaches 1 with its last step, and a decay reaches `min_ratio` with the phase's last. No step has a
    learning rate of zero unless `min_ratio` is zero. The end of the phase cuts a warm-up that is longer.
    """
    steps_done = step + 1
    if steps_done <= warmup_steps:
        return steps_done / warmup_steps
    if schedule == "constant":
        return 1.0
    decay_start = warmup_steps
    if schedule == "wsd":
        decay_start = max(warmup_steps, steps - math.ceil(steps * decay_share))
        if steps_done <= decay_start:
            return 1.0
    progress = (steps_done - decay_start) / max(1, steps - decay_start)
    decay = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * decay
