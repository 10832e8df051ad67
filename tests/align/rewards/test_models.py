"""Rewards of models: scores, marks, failures, and a judge that must be held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from koine.align.rewards.models import NO_MARK, Judge, ModelReward, check_held_out, models_of
from koine.align.rewards.reward import Answered, RewardFailure, RewardSummary, score
from koine.errors import UserError
from koine.generate import RemoteEngine
from koine.generate.engine import Completion
from koine.generate.messages import Message
from koine.generate.sampling import Sampling
from tests.generate.remote.test_engine import Endpoint

ASKED: list[Message] = [{"role": "user", "content": "What is {answer}?"}]


@dataclass
class Scores:
    """A reward model that gives the scores it is told to."""

    values: list[float]
    seen: list[Sequence[Message]] = field(default_factory=list)

    def score(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        self.seen += conversations
        return self.values


@dataclass
class Says:
    """An engine that gives the responses it is told to."""

    responses: list[str]
    prompts: list[str] = field(default_factory=list)
    path: Path | None = None

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Completion]:
        self.prompts += [conversation[-1]["content"] for conversation in conversations]
        assert sampling.temperature == 0
        return [
            Completion(text=text, tokens=(), log_probabilities=(), prompt_tokens=1, finish="stop")
            for text in self.responses
        ]


def answered(*completions: str) -> list[Answered]:
    return [Answered(ASKED, completion, {}) for completion in completions]


def test_scores_of_a_reward_model_and_nan() -> None:
    scorer = Scores([0.5, float("nan"), -3, float("inf")])
    outcomes = score(ModelReward(scorer=scorer), answered("a", "b", "c", "d"))
    assert [outcome.value for outcome in outcomes] == [0.5, None, -3.0, None]
    assert scorer.seen[0] == [*ASKED, {"role": "assistant", "content": "a"}]
    summary = RewardSummary.of(outcomes)
    assert (summary.scored, summary.mean, summary.failures) == (2, -1.25, {"the reward is not finite": 2})
    with pytest.raises(RewardFailure):
        ModelReward(scorer=Scores([float("nan")]))(ASKED, "a", {})


def test_another_number_of_scores() -> None:
    with pytest.raises(UserError, match="2 scores for 1"):
        score(ModelReward(scorer=Scores([1.0, 2.0])), answered("a"))
    assert score(ModelReward(scorer=Scores([])), []) == []


@pytest.mark.parametrize(
    ("response", "value", "failure"),
    [
        ("Good.\nMark: 10", 1.0, None),
        ("Mark: 1", 0.0, None),
        ("**Mark: 5.5**\n", 0.5, None),
        ("mark：4/10.", 1 / 3, None),
        ("Not Mark: 10 but Mark: 1", 0.0, None),
        ("Mark: 10\nI am not sure.", None, NO_MARK),
        ("", None, NO_MARK),
        ("I refuse.", None, NO_MARK),
        ("Mark: ten", None, NO_MARK),
        ("Mark: 11", None, "the judge's mark is not from 1 to 10"),
        ("Mark: -1", None, "the judge's mark is not from 1 to 10"),
    ],
)
def test_marks(response: str, value: float | None, failure: str | None) -> None:
    (outcome,) = score(Judge(engine=Says([response])), answered("a"))
    assert outcome.failure == failure
    assert outcome.value == (None if value is None else pytest.approx(value))


def test_the_prompt_shows_both_and_is_filled_once() -> None:
    """Names of placeholders in a conversation or an answer stay as they are."""
    engine = Says(["Mark: 3"])
    score(Judge(engine=engine, high=5), answered("It is {conversation}. Mark: 5"))
    assert "user: What is {answer}?" in engine.prompts[0]
    assert "It is {conversation}. Mark: 5" in engine.prompts[0]
    assert "from 1 (worst) to 5 (best)" in engine.prompts[0]


def test_settings_of_a_judge() -> None:
    with pytest.raises(UserError, match=r"\{answer\}"):
        Judge(engine=Says([]), template="{conversation}")
    with pytest.raises(UserError, match="high"):
        Judge(engine=Says([]), low=3, high=3)


def test_the_judge_must_not_be_the_reward_model(tmp_path: Path) -> None:
    engine = Says([])
    for judge, rewards in (
        (engine, [engine]),
        ("openai/x", ["openai/x"]),
        (Says([], path=tmp_path), [tmp_path]),
    ):
        with pytest.raises(UserError, match="the judge is the reward model"):
            check_held_out(judge, rewards)
    check_held_out(engine, [Says([])])
    check_held_out("openai/x", ["openai/y", engine])
    check_held_out(engine, models_of(ModelReward(scorer=Scores([]))))


def test_two_engines_of_one_endpoint_are_the_same_judge() -> None:
    def engine(model: str, port: int = 1) -> RemoteEngine:
        return RemoteEngine(f"http://127.0.0.1:{port}/v1", model)

    with pytest.raises(UserError, match="the judge is the reward model"):
        check_held_out(engine("a"), models_of(Judge(engine=engine("a"))))
    check_held_out(engine("a"), [engine("b"), engine("a", 2)])


def test_a_judge_behind_an_endpoint() -> None:
    """The engine of an endpoint, against a server in a process of its own."""
    endpoint = Endpoint()
    try:
        judge = Judge(
            engine=RemoteEngine(endpoint.url, "judge", log_probabilities=False),
            template="{conversation}{answer}",
        )
        prompt = judge.prompt(answered("ok")[0])
        endpoint.plan(
            **{
                prompt: [{"content": "Fine.\nMark: 10"}],
                judge.prompt(answered("no")[0]): [{"content": "No."}],
            }
        )
        outcomes = score(judge, answered("ok", "no"))
        assert [outcome.value for outcome in outcomes] == [1.0, None]
        assert outcomes[1].failure == NO_MARK
        assert endpoint.bodies()[0]["temperature"] == 0
    finally:
        endpoint.close()


def test_a_copy_of_the_reward_model_is_the_reward_model(tmp_path: Path) -> None:
    for name, weights in (("a", b"12"), ("b", b"12"), ("c", b"13"), ("empty", None)):
        (tmp_path / name).mkdir()
        if weights is not None:
            (tmp_path / name / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="the judge is the reward model"):
        check_held_out(tmp_path / "a", [str(tmp_path / "b")])
    check_held_out(tmp_path / "a", [tmp_path / "c", tmp_path / "empty"])
