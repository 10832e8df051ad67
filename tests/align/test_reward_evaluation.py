"""Figures of a reward model, against values by hand and a model whose probabilities are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from koine.align.reward_evaluation import (
    PairScore,
    calibration_bins,
    correlation,
    evaluate_pairs,
    evaluation_blocks,
    expected_calibration_error,
)
from koine.errors import UserError
from koine.plan.report.blocks import check_block


def pair(
    difference: float, probability: float = 1.0, lengths: tuple[int, int] = (10, 10), code: str = "en"
) -> PairScore:
    return PairScore(code, probability, (difference, 0.0), lengths)


def test_accuracy_by_hand() -> None:
    pairs = [
        pair(2.0, lengths=(20, 10)),  # right
        pair(-1.0, lengths=(10, 20)),  # wrong
        pair(0.5, 0.8),  # right with probability 0.8
        pair(0.3, 0.5, (100, 95)),  # a tie
        pair(-0.1, 0.0, (9, 10), "de"),  # the second is better, and scored higher
        pair(0.1, 0.0, (30, 10), "de"),
    ]
    found = evaluate_pairs(pairs)
    assert found["overall"]["accuracy"] == pytest.approx((1 + 0 + 0.8 + 0.5 + 1 + 0) / 6)
    # Of about equal lengths: (10, 10), (100, 95) and (9, 10).
    assert found["overall"]["pairs_length_matched"] == 3
    assert found["overall"]["accuracy_length_matched"] == pytest.approx((0.8 + 0.5 + 1) / 3)
    # The longer one is better in 1, 0, half of an equal pair, half, 1 and 0 of them.
    assert found["overall"]["accuracy_of_longer"] == pytest.approx((1 + 0 + 0.5 + 0.5 + 1 + 0) / 6)
    assert found["languages"]["de"]["accuracy"] == 0.5
    assert found["languages"]["en"]["accuracy"] == pytest.approx(2.3 / 4)
    assert found["worst_language"] == "de"
    for block in evaluation_blocks(found):
        check_block(block, "test")


def test_calibration_of_known_probabilities() -> None:
    """Labels are drawn with the probability that the scores claim; twice the difference claims too much."""
    draw = np.random.default_rng(0)
    difference = draw.normal(0, 2, size=40_000)
    label = draw.random(len(difference)) < 1 / (1 + np.exp(-difference))
    honest = [pair(float(d), float(one)) for d, one in zip(difference, label, strict=True)]
    proud = [pair(2 * float(d), float(one)) for d, one in zip(difference, label, strict=True)]
    assert expected_calibration_error(calibration_bins(honest, 10)) < 0.01
    # sigmoid(2d) - sigmoid(d), the mean over |d| of the normal distribution.
    size = np.abs(difference)
    expected = float((1 / (1 + np.exp(-2 * size)) - 1 / (1 + np.exp(-size))).mean())
    assert expected_calibration_error(calibration_bins(proud, 10)) == pytest.approx(expected, abs=0.01)
    # A pair the other way round is the same pair.
    turned = [PairScore("en", 1 - one.probability, one.scores[::-1], one.lengths[::-1]) for one in honest]
    assert calibration_bins(turned, 10) == calibration_bins(honest, 10)


def test_soft_labels_are_calibrated_exactly() -> None:
    logits = [0.2, 0.9, -1.5, 3.0, -0.4]
    pairs = [pair(d, 1 / (1 + np.exp(-d))) for d in logits]
    figures = evaluate_pairs(pairs)["overall"]
    assert figures["calibration_error"] == pytest.approx(0, abs=1e-12)
    entropy = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (one.probability for one in pairs)]
    assert figures["loss"] == pytest.approx(np.mean(entropy))


def test_correlation_with_length() -> None:
    longer_is_better = [
        PairScore("en", 1.0, (0.1 * a, 0.1 * b), (a, b)) for a, b in ((3, 9), (20, 4), (7, 7))
    ]
    figures = evaluate_pairs(longer_is_better)["overall"]
    assert figures["length_correlation"] == pytest.approx(1)
    assert figures["length_difference_correlation"] == pytest.approx(1)
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])) == pytest.approx(0.5)
    assert correlation(np.ones(3), np.arange(3.0)) is None


@dataclass(frozen=True)
class Bounds:
    """Arguments out of their range."""

    given: dict[str, Any]
    says: str


@pytest.mark.parametrize(
    "bounds", [Bounds({"length_share": 1.5}, "length_share is 1.5"), Bounds({"bins": 0}, "bins is 0")]
)
def test_bounds(bounds: Bounds) -> None:
    with pytest.raises(UserError, match=bounds.says):
        evaluate_pairs([pair(1.0)], **bounds.given)
    with pytest.raises(UserError, match="no pair"):
        evaluate_pairs([])
