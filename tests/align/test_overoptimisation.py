"""The rule on made-up courses of entropy, mass and diversity whose right verdict is known."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from koine.align.calibration import GoldRun, choose_constants, measure_rule
from koine.align.overoptimisation import Calibration, Constants, best_evaluation, verdict
from koine.errors import UserError

RULE = Constants(rise=0.1, fall=0.05, mass_fall=0.02, patience=2)


def course(
    entropy: Sequence[float],
    mass: Sequence[float] | float = 0.95,
    ead: Sequence[float] | None = None,
    language: str = "",
) -> list[dict[str, float]]:
    """Evaluations every 50 steps; diversity rises unless it is given."""
    masses = [mass] * len(entropy) if isinstance(mass, float) else mass
    eads = ead or [0.1 + 0.01 * index for index in range(len(entropy))]
    suffix = f"/{language}" if language else ""
    return [
        {"step": 50 * (i + 1), f"entropy{suffix}": e, f"mass{suffix}": m, f"ead{suffix}": d}
        for i, (e, m, d) in enumerate(zip(entropy, masses, eads, strict=True))
    ]


def merged(*courses: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{key: value for one in row for key, value in one.items()} for row in zip(*courses, strict=True)]


TURN = [1.0, 1.2, 1.4, 1.3, 1.2, 1.1]


def test_sign_a_is_the_turn_of_the_entropy_while_diversity_rises() -> None:
    found = verdict(course(TURN), RULE)
    assert found.state == "over-optimised"
    assert found.sign is not None
    assert (found.sign.name, found.sign.since) == ("entropy", 150)
    assert (found.step, found.keep) == (250, 150)
    assert found.text.startswith(
        "entropy has turned down since step 150, diversity still rises: over-optimised; "
        "the best model is that of step 150"
    )
    assert "not calibrated" in found.text


def test_the_states_before_it() -> None:
    states = [verdict(course(TURN[:n]), RULE).state for n in range(1, 7)]
    assert states == ["early", "none", "none", "begins", "over-optimised", "over-optimised"]
    begins = verdict(course(TURN[:4]), RULE)
    assert "over-optimised if 1 more evaluation shows it too" in begins.text
    assert "rose from 1.00 bits at step 50 to 1.40 at step 150" in verdict(course(TURN[:3]), RULE).text


@pytest.mark.parametrize(
    ("entropy", "ead"),
    [
        ([1.0, 1.2, 1.4, 1.5, 1.6, 1.7], None),  # rises to the end
        ([1.7, 1.6, 1.5, 1.4, 1.3, 1.2], None),  # falls from the start: nothing has turned
        ([1.0, 1.05, 1.09, 1.0, 0.9, 0.8], None),  # rose by less than 0.1
        ([1.0, 1.2, 1.4, 1.36, 1.37, 1.38], None),  # fell by less than 0.05
        (TURN, [0.1, 0.2, 0.3, 0.28, 0.26, 0.24]),  # diversity falls too: surer, not over-optimised
        ([1.0, 1.4, 1.2, 1.4, 1.2, 1.4], None),  # never two evaluations in a row
    ],
)
def test_what_is_no_sign(entropy: list[float], ead: list[float] | None) -> None:
    found = verdict(course(entropy, ead=ead), RULE)
    assert found.state == "none"
    assert found.step is None
    assert best_evaluation(course(entropy, ead=ead), RULE) == 5


def test_sign_b_is_the_fall_of_the_mass_while_entropy_rises() -> None:
    evaluations = course([1.0, 1.2, 1.4, 1.6, 1.8, 2.0], [0.96, 0.97, 0.965, 0.94, 0.92, 0.9])
    found = verdict(evaluations, RULE)
    assert found.state == "over-optimised"
    assert found.sign is not None
    assert (found.sign.name, found.sign.since, found.step, found.keep) == ("mass", 100, 250, 150)
    assert found.text.startswith("top-10 mass has fallen since step 100, entropy still rises: over-optimised")


def test_two_different_signs_in_a_row_do_not_add_up() -> None:
    evaluations = course([1.0, 1.2, 1.4, 1.5, 1.4], [0.97, 0.97, 0.97, 0.94, 0.94])
    assert verdict(evaluations, RULE).state == "begins"


def test_languages_are_named_in_the_order_of_their_turns() -> None:
    late = course([1.0, 1.2, 1.4, 1.5, 1.4, 1.3], language="de")
    early = course([1.0, 1.3, 1.2, 1.1, 1.0, 0.9], language="hi")
    never = course([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], language="en")
    found = verdict(merged(course(TURN), late, early, never), RULE)
    assert found.languages == ("hi", "de")
    assert "over-optimised; Hindi first; " in found.text
    calm = verdict(merged(course([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), early), RULE)
    assert calm.state == "none"
    assert calm.text.endswith("over-optimised by its own figures: Hindi")


def test_it_depends_on_the_past_alone_and_stays() -> None:
    """What comes after a stop changes neither its step nor what is kept."""
    draw, stopped = random.Random(3), 0
    for _ in range(200):
        entropy = [1 + draw.random() for _ in range(12)]
        mass = [0.9 + 0.1 * draw.random() for _ in range(12)]
        evaluations = course(entropy, mass, [draw.random() for _ in range(12)])
        steps = [verdict(evaluations[:n], RULE).step for n in range(1, 13)]
        stops = [step for step in steps if step is not None]
        if not stops:
            continue
        stopped += 1
        first = steps.index(stops[0])
        assert set(stops) == {50 * (first + 1)}
        assert steps[first:] == [stops[0]] * (12 - first)
        assert len({best_evaluation(evaluations[:n], RULE) for n in range(first + 1, 13)}) == 1
    assert stopped > 20


def test_the_evaluation_kept_is_the_last_or_the_one_kept_before() -> None:
    """Training has only these two checkpoints."""
    draw = random.Random(5)
    for _ in range(200):
        evaluations = course([1 + draw.random() for _ in range(12)], [draw.random() for _ in range(12)])
        kept = [best_evaluation(evaluations[:n], RULE) for n in range(1, 13)]
        assert all(
            now in (before, index) for index, (before, now) in enumerate(zip(kept, kept[1:], strict=False), 1)
        )


def test_constants_are_checked() -> None:
    with pytest.raises(UserError, match="fall"):
        Constants(fall=-1)
    with pytest.raises(UserError, match="patience"):
        Constants(patience=0)


# --- calibration ---


def run(entropy: list[float], gold: list[float]) -> GoldRun:
    return GoldRun(tuple(course(entropy)), tuple(gold))


def test_detections_false_alarms_lead_and_regret_by_hand() -> None:
    harmed = run(TURN, [0.5, 0.6, 0.7, 0.69, 0.66, 0.6])  # 0.05 lost at step 300; the rule stops at 250
    missed = run([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [0.5, 0.7, 0.6, 0.5, 0.4, 0.3])  # keeps the last one
    alarm = run(TURN, [0.5, 0.51, 0.52, 0.53, 0.54, 0.55])  # keeps step 150: 0.03 below the best
    quiet = run([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [0.5, 0.51, 0.52, 0.53, 0.54, 0.55])
    found = measure_rule([harmed, missed, alarm, quiet], RULE, loss=0.05)
    assert (found.over_optimised, found.detected, found.other, found.false_alarms) == (2, 1, 2, 1)
    assert found.lead == 50
    assert found.regret == pytest.approx((0 + 0.4 + 0.03 + 0) / 4)
    text = verdict(course(TURN), Constants(rise=0.1, fall=0.05, calibration=found)).text
    assert (
        "on 4 other runs it found 1 of 2 over-optimised ones, with 1 false alarms in 2, 50 steps ahead"
        in text
    )


def test_the_constants_with_the_least_regret_are_chosen() -> None:
    runs = [run(TURN, [0.5, 0.6, 0.7, 0.69, 0.6, 0.3])]
    blind = Constants(rise=5.0)
    assert choose_constants(runs, [blind, RULE], loss=0.05) == RULE
    with pytest.raises(UserError, match="no constants"):
        choose_constants(runs, [], loss=0.05)
    with pytest.raises(UserError, match="no run"):
        measure_rule([], RULE, loss=0.05)
    with pytest.raises(UserError, match="2 gold rewards for 6"):
        run(TURN, [0.1, 0.2])


def test_a_calibration_in_words() -> None:
    late = Calibration(over_optimised=9, detected=7, other=3, false_alarms=0, lead=-100.0, regret=0.0123)
    assert "100 steps late, regret 0.012" in str(late)
