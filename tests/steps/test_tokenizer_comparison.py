"""Adaptation speed, computed by hand."""

from __future__ import annotations

import pytest

from koine.steps.tokenizer_comparison import adaptation_speed, first_reach


def test_first_reach_interpolates() -> None:
    # From 3.0 at step 10 to 2.0 at step 20: 2.5 is half-way.
    assert first_reach([10, 20], [3.0, 2.0], 2.5) == 15.0
    assert first_reach([10, 20], [3.0, 2.0], 1.9) is None
    assert first_reach([10, 20], [3.0, 2.0], 3.5) == 10.0


def test_speed_per_step_and_per_byte() -> None:
    curves = {"universal": ([10, 20, 30], [3.0, 2.0, 1.0]), "cluster": ([10, 20, 30], [4.0, 3.0, 2.5])}
    # The cluster arm ends at 2.5 after 30 steps; the universal one is there at 15: twice as fast. It reads 3 bytes a token in place of
    # 2, so by bytes it is only 2 * 2 / 3 as fast.
    speed = adaptation_speed(curves, {"universal": 3.0, "cluster": 2.0})
    assert speed["per_step"] == pytest.approx(2.0)
    assert speed["per_byte"] == pytest.approx(4.0 / 3.0)


def test_an_arm_that_never_reaches_the_level_has_no_speed() -> None:
    curves = {"universal": ([10, 20], [4.0, 3.0]), "cluster": ([10, 20], [3.0, 2.0])}
    speed = adaptation_speed(curves, {"universal": 1.0, "cluster": 1.0})
    assert speed["per_step"] is None
    assert "1.000 bits per byte above" in str(speed["note"])
