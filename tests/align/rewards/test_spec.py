"""Specifications of rewards, weighted sums, functions of users, checks of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from koine.align.rewards import (
    REWARDS,
    Answered,
    RewardOutcome,
    RewardSpec,
    RewardSummary,
    check_records,
    score,
)
from koine.align.rewards.spec import setting_types
from koine.errors import UserError

from .test_models import Says, Scores


def terms(text: str) -> list[tuple[float, str, dict[str, Any]]]:
    return [(term.weight, term.name, dict(term.settings)) for term in RewardSpec.parse(text).terms]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("answer", [(1.0, "answer", {})]),
        ("0.7*language+0.3*length:most=20", [(0.7, "language", {}), (0.3, "length", {"most": 20.0})]),
        (
            " 1 * answer:contained=0.5 + -0.1*length:most=1e+3,least=2 ",
            [(1.0, "answer", {"contained": 0.5}), (-0.1, "length", {"most": 1000.0, "least": 2.0})],
        ),
        ("1e+1*answer+2*form:json=true", [(10.0, "answer", {}), (2.0, "form", {"json": True})]),
        ("form:pattern='a+b,c:d=\"e\"',most=2", [(1.0, "form", {"pattern": 'a+b,c:d="e"', "most": 2.0})]),
        ('form:pattern="it\'s"+answer', [(1.0, "form", {"pattern": "it's"}), (1.0, "answer", {})]),
        ("language:candidates='de fr',soft=true", [(1.0, "language", {"candidates": "de fr", "soft": True})]),
        ("unit-tests:seconds=2,workers=3", [(1.0, "unit-tests", {"seconds": 2.0, "workers": 3})]),
        ("0.5*mine.own:brevity", [(0.5, "mine.own:brevity", {})]),
        (
            "mine:brevity:scale=2,name=x,on=true,share=0.5",
            [(1.0, "mine:brevity", {"scale": 2, "name": "x", "on": True, "share": 0.5})],
        ),
    ],
)
def test_specifications(text: str, expected: list[tuple[float, str, dict[str, Any]]]) -> None:
    assert terms(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no reward"),
        ("answer+", "is no reward"),
        ("langage", "unknown reward 'langage'.*did you mean 'language'"),
        ("answer:contained", "a setting without a value"),
        ("answer:contained=1,x", "not KEY=VALUE"),
        ("answer:contined=1", "no setting 'contined'.*contained"),
        ("answer:contained=2", "contained is 2"),
        ("answer:contained=x", "must be a number"),
        ("answer:contained=nan", "must be a number"),
        ("answer:contained=1,contained=0", "given twice"),
        ("0*answer", "weight of 'answer' is 0"),
        ("length", "needs the setting 'most'"),
        ("unit-tests:workers=1.5", "must be an integer"),
        ("form:json=yes", "true or false"),
        ("form:pattern=(", "no regular expression"),
        ("x*answer", "is no reward"),
    ],
)
def test_what_is_no_specification(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardSpec.parse(text)


def test_every_reward_has_typed_settings_and_can_be_specified() -> None:
    for name in REWARDS:
        for kind in setting_types(name).values():
            assert {kind, *getattr(kind, "__args__", ())} & {float, int, str, bool}
        RewardSpec.parse(f"{name}:most=3" if name == "length" else name)


def test_weighted_sum_and_failures() -> None:
    reward = RewardSpec.parse("2*answer+0.5*length:most=1+-1*reward-model").build(
        scorer=Scores([0.25, float("nan")])
    )
    outcomes = score(reward, [Answered([], "yes", {"answer": "yes"}), Answered([], "no", {"answer": "yes"})])
    assert outcomes == [
        RewardOutcome(2 + 0.5 - 0.25),
        RewardOutcome(None, "reward-model: the reward is not finite"),
    ]


def test_models_are_needed_and_the_judge_is_another() -> None:
    spec = RewardSpec.parse("reward-model+judge:high=5")
    assert spec.needs == {"scorer", "engine"}
    with pytest.raises(UserError, match="needs a reward model"):
        spec.build(engine=Says([]))
    both: Any = Says([])
    with pytest.raises(UserError, match="the judge is the reward model"):
        spec.build(scorer=both, engine=both)
    spec.build(scorer=Scores([]), engine=Says([]))


MODULE = """
from koine.align.rewards import RewardFailure

def brevity(conversation, completion, record, *, scale=1):
    return scale / (1 + len(completion))

def broken(conversation, completion, record):
    return {"nan": float("nan"), "text": "high", "raise": 1 / 0 if completion == "raise" else 0.0}.get(completion, 2)

def refuses(conversation, completion, record):
    raise RewardFailure("too hard")

def wrong(completion):
    return 0.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_rewards_for_tests.py").write_text(MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("import nothing_of_this_name")
    monkeypatch.syspath_prepend(tmp_path)
    return "my_rewards_for_tests"


def test_functions_of_users(module: str) -> None:
    reward = RewardSpec.parse(f"{module}:brevity:scale=3").build()
    assert reward([], "ab", {}) == 1.0
    broken = RewardSpec.parse(f"{module}:broken").build()
    outcomes = score(broken, [Answered([], completion, {}) for completion in ("nan", "text", "raise", "x")])
    assert [outcome.failure for outcome in outcomes] == [
        "the reward is not finite",
        "the reward is a str and no number",
        "ZeroDivisionError: division by zero",
        None,
    ]
    refused = score(RewardSpec.parse(f"2*{module}:refuses").build(), [Answered([], "x", {})])
    assert refused[0].failure == f"{module}:refuses: too hard"
    with pytest.raises(UserError, match="scored none of 1"):
        RewardSummary.of(refused).check()
    RewardSummary.of(outcomes).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards_for_tests:brevty", "no function 'brevty'.*brevity"),
        ("no_such_module_here:f", "cannot be imported"),
        ("my_broken_rewards:f", "nothing_of_this_name"),
        ("my_rewards_for_tests:wrong", "cannot be called"),
        ("my_rewards_for_tests:brevity:size=2", "cannot be called.*size"),
    ],
)
@pytest.mark.usefixtures("module")
def test_functions_that_cannot_be_used(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RewardSpec.parse(name).build()


def test_records_are_checked_by_every_term() -> None:
    reward = RewardSpec.parse("answer+0.1*language").build()
    check_records(reward, [{"answer": "x", "language": "de"}])
    with pytest.raises(UserError, match="record 2: the record's language"):
        check_records(reward, [{"answer": "x", "language": "de"}, {"answer": "x"}])
    with pytest.raises(UserError, match="record 'q7'"):
        check_records(reward, [{"id": "q7", "language": "de"}])
