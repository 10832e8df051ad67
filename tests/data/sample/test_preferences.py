"""The gold reward on cases worked out by hand in several scripts, and pairs drawn from the pool."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from koine.data import read_records
from koine.data.group_tokens import group_fault
from koine.data.sample import QUESTION_LANGUAGES, GoldReward, gold_reward, write_sample
from koine.data.sample.facts import facts, is_asked, split_of
from koine.data.sample.gold import MOST
from koine.data.sample.preferences import (
    COMPLETION_KINDS,
    PairSettings,
    completion,
    preference_records,
    prompt_plans,
)
from koine.data.sample.rendering import sentences_of, sides
from koine.errors import UserError

THIRD = pytest.approx(1 / 3)
TWO_THIRDS = pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("code", "fact", "text", "expected"),
    [
        # fact, language, form, brevity
        ("en", "capital:JP", "The capital of Japan is: Tokyo.", (1, 1, 1, 1)),
        ("en", "capital:JP", "Tokyo", (1, 1, 0, 1)),
        ("en", "capital:JP", "  TOKYO \n", (1, 1, 0, 1)),
        ("en", "capital:JP", "Tokyo.", (1, 1, THIRD, 1)),
        ("en", "capital:JP", "Paris", (0, 1, 0, 1)),
        # A guess among three answers.
        ("en", "capital:JP", "Tokyo, Paris, London", (THIRD, 1, 0, 1)),
        ("en", "capital:JP", "東京", (1, 0, 0, 1)),
        ("en", "capital:JP", "日本の首都は東京です。", (1, 0, THIRD, 1)),
        # The question back: subject and other words, but no end of a statement.
        ("en", "capital:JP", "What is the capital of Japan?", (0, 1, TWO_THIRDS, 1)),
        # Part of a word is no name.
        ("en", "capital:JP", "Tokyoites", (0, 0, THIRD, 1)),
        ("en", "capital:JP", "", (0, 0, 0, 0)),
        ("en", "capital:JP", " ?!\n", (0, 0, 0, 0)),
        # The subject is an answer of the same kind, and no wrong one.
        ("en", "month:1", "After January comes February.", (1, 1, 1, 1)),
        ("en", "sum:3+4", "7", (1, 1, 0, 1)),
        ("en", "sum:3+4", "17", (0, 1, 0, 1)),
        ("en", "sum:3+4", "The sum: 3 + 4 = 7.", (1, 1, 1, 1)),
        # Another number; "or" is no word of the sample world.
        ("en", "sum:3+4", "7 or 8", (0.5, 0, THIRD, 1)),
        ("de", "quantity:duration-day:3+4", "7 Tage", (1, 1, 0, 1)),
        ("hi", "capital:JP", "जापान की राजधानी टोक्यो है।", (1, 1, 1, 1)),
        ("hi", "capital:JP", "टोक्यो", (1, 1, 0, 1)),
        ("hi", "capital:JP", "Tokyo", (1, 0, 0, 1)),
        ("ar", "capital:JP", "اسم عاصمة اليابان هو طوكيو.", (1, 1, 1, 1)),
        ("he", "capital:JP", "טוקיו", (1, 1, 0, 1)),
        ("zh", "month:10", "十月之后是十一月。", (1, 1, 1, 1)),
        # December is followed by January, which the name of November holds.
        ("zh", "month:12", "一月", (1, 1, 0, 1)),
        ("zh", "month:12", "十一月", (0, 1, 0, 1)),
        ("ja", "month:1", "1月の次は2月です。", (1, 1, 1, 1)),
        ("ja", "month:1", "12月", (0, 1, 0, 1)),
        ("ko", "month:1", "2월", (1, 1, 0, 1)),
        ("ko", "month:1", "12월", (0, 1, 0, 1)),
        # Thai has no sign at the end of a sentence.
        ("th", "capital:JP", "เมืองหลวงของญี่ปุ่นคือโตเกียว", (1, 1, 1, 1)),
        ("th", "capital:JP", "โตเกียว", (1, 1, 0, 1)),
        ("ru", "language:DE", "немецкий", (1, 1, 0, 1)),
    ],
)
def test_parts_of_the_reward(code: str, fact: str, text: str, expected: tuple[Any, ...]) -> None:
    found = gold_reward({"language": code, "fact": fact}, text)
    assert (found.fact, found.language, found.form, found.brevity) == expected


def test_brevity_falls_to_zero_at_three_sentences() -> None:
    longest = max(map(len, sentences_of("en", "capital:JP")))
    record = {"language": "en", "fact": "capital:JP"}
    values = [gold_reward(record, "x" * round(factor * longest)).brevity for factor in (1, 2, 3, 9)]
    assert values == [1.0, 0.5, 0.0, 0.0]


def test_total_is_the_weighted_sum() -> None:
    assert GoldReward(1.0, 1.0, 1.0, 1.0).total == MOST == 6.0
    assert GoldReward(0.5, 0.0, 1.0, 0.25).total == 0.5 * 3 + 1 + 0.25


@pytest.mark.parametrize("code", QUESTION_LANGUAGES)
def test_right_sentences_get_the_highest_reward(code: str) -> None:
    for kind, names in facts().items():
        for fact in names[:: max(1, len(names) // 5)]:
            for text in sentences_of(code, fact):
                found = gold_reward({"language": code, "fact": fact}, text)
                assert found.total == pytest.approx(MOST), (kind, text, found)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"language": "sw", "fact": "capital:JP"}, "no questions in 'sw'"),
        ({"language": "en", "fact": "capital:XX"}, "'capital:XX' is no fact"),
        ({"language": "en"}, "'None' is no fact"),
    ],
)
def test_records_without_a_fact(record: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gold_reward(record, "Tokyo")


LANGUAGES = ("en", "de", "zh", "ar")
PLANS = prompt_plans(400, seed=3)


def test_rewards_of_the_pool() -> None:
    means = {}
    for kind in COMPLETION_KINDS:
        generator = random.Random(0)
        rewards = []
        for plan in [one for one in PLANS[:100] if sides("de", one.fact) is not None]:
            text = completion(kind, "de", plan, generator, LANGUAGES)
            assert text is not None
            rewards.append(gold_reward({"language": "de", "fact": plan.fact}, text).total)
        means[kind] = sum(rewards) / len(rewards)
    assert means["sentence"] == pytest.approx(6.0)
    assert means["short"] == pytest.approx(5.0, abs=0.05)
    assert means["wrong"] == pytest.approx(2.0, abs=0.05)
    assert means["sentence"] > means["short"] > means["rambling"] > means["wrong_sentence"] > means["wrong"]
    assert means["other_language"] < means["short"]
    assert max(means["off_topic"], means["echo"]) < means["wrong_sentence"]


def test_pairs() -> None:
    settings = PairSettings()
    records = list(preference_records("de", PLANS, settings=settings, languages=LANGUAGES))
    assert records == list(preference_records("de", PLANS, settings=settings, languages=LANGUAGES))
    # CLDR has no German name of one script's language.
    known = [plan for plan in PLANS if sides("de", plan.fact) is not None]
    assert [record["fact"] for record in records] == [plan.fact for plan in known]
    flipped = sum(record["flipped"] for record in records)
    # Four standard deviations of a binomial.
    assert abs(flipped - len(known) / 4) < 4 * (400 * 0.25 * 0.75) ** 0.5
    best = 0
    for record in records:
        for side in ("chosen", "rejected"):
            text = record[side][0]["content"]
            assert record[f"score_{side}"] == pytest.approx(gold_reward(record, text).total, abs=1e-6)
        assert (record["score_chosen"] < record["score_rejected"]) == record["flipped"]
        assert group_fault(record, "preferences") is None
        best += "sentence" in (record["chosen_kind"], record["rejected_kind"])
    # The best answer is in a quarter of the pairs only.
    assert 0.15 < best / len(records) < 0.35


def test_labels_are_right_without_flips() -> None:
    records = preference_records("zh", PLANS, settings=PairSettings(flipped=0.0), languages=LANGUAGES)
    assert all(record["score_chosen"] > record["score_rejected"] for record in records)


def test_weights_choose_completions() -> None:
    settings = PairSettings(weights={"short": 1.0, "wrong": 1.0, "sentence": 0.0})
    for record in preference_records("en", PLANS[:20], settings=settings, languages=LANGUAGES):
        assert {record["chosen_kind"], record["rejected_kind"]} == {"short", "wrong"}


def test_prompts() -> None:
    asked = {(plan.fact, plan.wording) for plan in PLANS}
    heldout = {(plan.fact, plan.wording) for plan in prompt_plans(80, seed=3, heldout=True)}
    assert not asked & heldout
    assert all(is_asked(fact) and split_of(fact) in ("train", "recall") for fact, _ in asked | heldout)
    # Every question once before one comes again.
    many = Counter((plan.fact, plan.wording) for plan in prompt_plans(900, seed=0))
    assert set(many.values()) == {900 // len(many), 900 // len(many) + 1}
    assert prompt_plans(5, seed=0) != prompt_plans(5, seed=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flipped": 0.6}, "flipped"),
        ({"kinds": ("capitol",)}, "no kind of facts 'capitol'"),
        ({"weights": {"sentense": 1.0, "short": 1.0}}, "no completion 'sentense'"),
        ({"weights": {"short": 1.0}}, "two kinds of completions"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PairSettings(**settings)


def test_written_with_the_sample_world(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"documents_per_language": 20, "questions_per_language": 20, "code_bytes": 0}
    write_sample(("en", "sw"), tmp_path / "without", **sizes)
    write_sample(("en", "sw"), tmp_path / "with", preferences_per_language=50, **sizes)
    assert not (tmp_path / "without" / "preferences").exists()
    # Nothing else changes, and a language without questions has no pairs.
    for path in (tmp_path / "without").rglob("*.json*"):
        same = tmp_path / "with" / path.relative_to(tmp_path / "without")
        assert same.read_bytes() == path.read_bytes()
    pairs = tmp_path / "with" / "preferences"
    assert sorted(path.name for path in pairs.rglob("*.jsonl")) == ["en.jsonl", "en.jsonl"]
    assert len((pairs / "train" / "en.jsonl").read_text().splitlines()) == 50
    test = [json.loads(line) for line in (pairs / "test" / "en.jsonl").read_text().splitlines()]
    assert len(test) == 5
    records = list(read_records(pairs / "test", split="all"))
    assert [record["fact"] for record in records] == [record["fact"] for record in test]
