"""`--stop-on`: what it parses, what it refuses, and where the rules stop."""

from __future__ import annotations

import pytest

from koine.align.overoptimisation import Constants
from koine.align.stopping import (
    StopAtLimit,
    StopOnOveroptimisation,
    StopWithoutImprovement,
    parse_stop_rule,
)
from koine.errors import UserError
from koine.train.fingerprint import objective_identity

from .test_overoptimisation import TURN, course

MEASURED = ("error", "kl", "accuracy", "entropy", "mass", "ead", "kl/hi")


def values(name: str, *found: float) -> list[dict[str, float]]:
    return [{"step": 50.0 * (index + 1), name: value} for index, value in enumerate(found)]


def test_what_it_parses() -> None:
    assert parse_stop_rule("overoptimisation", MEASURED) == StopOnOveroptimisation()
    assert parse_stop_rule("kl=0.5", MEASURED) == StopAtLimit("kl", 0.5)
    assert parse_stop_rule("kl/hi=2", MEASURED) == StopAtLimit("kl/hi", 2.0)
    assert parse_stop_rule("error", MEASURED) == StopWithoutImprovement("error")
    assert parse_stop_rule("-entropy", MEASURED) == StopWithoutImprovement("-entropy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rewards", "the metric 'rewards' is not measured"),
        ("kl=much", "'much' is no limit"),
        ("kl=nan", "'nan' is no limit"),
        ("kl=", "'' is no limit"),
        ("-kl=0.5", "'-kl' is no metric"),
        ("", "the metric '' is not measured"),
    ],
)
def test_what_it_refuses(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_stop_rule(text, MEASURED)


def test_overoptimisation_needs_samples() -> None:
    with pytest.raises(UserError, match="mass, ead are not measured"):
        parse_stop_rule("overoptimisation", ("error", "entropy"))


def test_a_limit_stops_at_the_value_and_keeps_the_evaluation_before() -> None:
    rule = StopAtLimit("kl", 0.5)
    evaluations = values("kl", 0.1, 0.49, 0.5)
    assert [rule(evaluations[:n]) is None for n in (1, 2, 3)] == [True, True, False]
    assert rule(evaluations) == "kl is 0.5, and the limit 0.5"
    assert rule.best(evaluations) == 1
    assert rule.best(evaluations[2:]) == 0
    with pytest.raises(UserError, match="no metric 'kl'"):
        rule(values("error", 0.1))


@pytest.mark.parametrize(("metric", "sign"), [("error", 1), ("accuracy", -1), ("-length", -1)])
def test_without_improvement_for_two_evaluations(metric: str, sign: int) -> None:
    rule = StopWithoutImprovement(metric)
    evaluations = values(rule.name, *(sign * value for value in (5.0, 3.0, 4.0, 3.0, 2.0)))
    assert [rule(evaluations[:n]) is None for n in range(1, 6)] == [True, True, True, False, True]
    assert "was best at step 100" in str(rule(evaluations[:4]))
    assert rule.best(evaluations) == 4


def test_the_rule_of_overoptimisation_says_its_verdict() -> None:
    rule = StopOnOveroptimisation(Constants(rise=0.1))
    assert rule(course(TURN[:4])) is None
    assert str(rule(course(TURN))).startswith("entropy has turned down since step 150")
    assert rule.best(course(TURN)) == 2
    with pytest.raises(UserError, match="no metric 'entropy'"):
        rule(values("kl", 0.1))


def test_identities_hold_all_arguments() -> None:
    assert objective_identity(StopAtLimit("kl", 0.5), what="stop rule") == {
        "class": "StopAtLimit", "metric": "kl", "limit": 0.5,
    }  # fmt: skip
    found = objective_identity(StopOnOveroptimisation(Constants(patience=3)), what="stop rule")
    assert found["constants"]["patience"] == 3
