"""Schedules beside those of `transformers`.

Theirs count the steps taken before (the first step has rate 0); ours count the step that is being taken.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from koine.train.schedule import learning_rate_factor
from koine.train.settings import Schedule

STEPS, WARMUP = 40, 6


def theirs(make: str, **arguments: Any) -> list[float]:
    transformers = pytest.importorskip("transformers")
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = getattr(transformers, make)(optimiser, **arguments)
    rates = []
    for _ in range(STEPS):
        optimiser.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    ("schedule", "make", "arguments"),
    [
        ("cosine", "get_cosine_schedule_with_warmup", {"num_training_steps": STEPS}),
        ("linear", "get_linear_schedule_with_warmup", {"num_training_steps": STEPS}),
        ("constant", "get_constant_schedule_with_warmup", {}),
        (
            "wsd",
            "get_wsd_schedule",
            {"num_decay_steps": 10, "num_stable_steps": STEPS - WARMUP - 10, "decay_type": "linear"},
        ),
    ],
)
def test_equals_transformers(schedule: Schedule, make: str, arguments: dict[str, Any]) -> None:
    ours = [
        learning_rate_factor(schedule, step, STEPS, warmup_steps=WARMUP, decay_share=0.25)
        for step in range(STEPS)
    ]
    assert ours == pytest.approx(theirs(make, num_warmup_steps=WARMUP, **arguments), abs=1e-12)


def test_ends_at_the_minimum() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        assert learning_rate_factor(schedule, 9, 10, min_ratio=0.1) == pytest.approx(0.1)


def test_a_warmup_longer_than_the_phase_is_cut() -> None:
    assert [learning_rate_factor("cosine", step, 3, warmup_steps=6) for step in range(3)] == [
        1 / 6,
        2 / 6,
        3 / 6,
    ]


def test_wsd_decays_over_whole_steps() -> None:
    """A quarter of 10 steps is 2.5: the last 3 decay, to the ratio in the last."""
    rates = [
        learning_rate_factor("wsd", step, 10, warmup_steps=2, min_ratio=0.1, decay_share=0.25)
        for step in range(10)
    ]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1])
    # A decay that would begin in the warm-up begins after it.
    rates = [learning_rate_factor("wsd", step, 4, warmup_steps=2, decay_share=1.0) for step in range(4)]
    assert rates == pytest.approx([0.5, 1.0, 0.5, 0.0])
