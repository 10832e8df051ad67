"""The learning rate's course, a pure function of the step inside its phase."""

from __future__ import annotations

import math

from koine.train.settings import Schedule


def multiplier(
    schedule: Schedule,
    step: int,
    steps: int,
    *,
    warmup_steps: int = 0,
    min_ratio: float = 0.0,
    decay_share: float = 0.2,
) -> float:
    """Factor on the peak learning rate at `step` (0 is the first) of a phase of `steps`.

    The warm-up reaches 1 with its last step and a decay reaches `min_ratio` with the phase's last, so that no step is taken at a
    rate of zero unless `min_ratio` is zero. A warm-up longer than the phase is cut by its end.
    """
    done = step + 1
    if done <= warmup_steps:
        return done / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(warmup_steps, steps - math.ceil(steps * decay_share))
        if done <= begin:
            return 1.0
    progress = (done - begin) / max(1, steps - begin)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return min_ratio + (1 - min_ratio) * fall
