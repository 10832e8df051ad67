"""Rewards of answers that can be checked."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from koine.align.rewards.answers import Answer, Arithmetic, SampleAnswer, numbers
from koine.align.rewards.text import contains
from koine.data.sample import QUESTION_LANGUAGES, write_sample
from koine.errors import UserError


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("7 + 12 = 19.", None, ["7", "12", "19"]),
        ("1,234.5", "en", ["1234.5"]),
        ("1.234,5", "de", ["1234.5"]),
        ("2.5", "de", ["2.5"]),
        ("3,4", "en", ["3.4"]),
        ("1,2,3", "en", ["1", "2", "3"]),
        ("12\u202f345,5", "fr", ["12345.5"]),
        ("12,34,567", "hi", ["1234567"]),
        ("१२ + ३", "hi", ["12", "3"]),
        ("٣٫٥", "ar", ["3.5"]),
        ("−4 and 5-3, then -2", "en", ["-4", "5", "3", "-2"]),
        ("2025–2026", "en", ["2025", "2026"]),
        ("none", "en", []),
        ("1 , 2 . 3", "en", ["1", "2", "3"]),
    ],
)
def test_numbers_of_many_languages(text: str, code: str | None, expected: list[str]) -> None:
    assert numbers(text, code) == [Decimal(one) for one in expected]


@pytest.mark.parametrize(
    ("completion", "answer", "code", "value"),
    [
        ("The sum is 19.", "19", "en", 1.0),
        ("7 + 12 = 20", 19, "en", 0.0),
        ("Es sind 1.234 Stück", "1234", "de", 1.0),
        ("It is 1.234", "1234", "en", 0.0),
        ("उत्तर: १९", 19, "hi", 1.0),
        ("I do not know", 19, "en", 0.0),
    ],
)
def test_arithmetic(completion: str, answer: Any, code: str, value: float) -> None:
    assert Arithmetic()([], completion, {"answer": answer, "language": code}) == value


def test_arithmetic_tolerance_and_bad_records() -> None:
    assert Arithmetic(tolerance=0.01)([], "3.141", {"answer": 3.14159}) == 1.0
    assert Arithmetic()([], "3.141", {"answer": 3.14159}) == 0.0
    for answer in (None, "none", True, float("nan")):
        with pytest.raises(UserError):
            Arithmetic().check({"answer": answer})


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ("It is Paris, I think", "Paris", True),
        ("Parisian food", "Paris", False),
        ("the answer is 119", "19", False),
        ("the answer is 19km", "19", True),
        ("答えは円です", "円", True),
        ("rain in Spain", "in", True),
        ("raining", "in", False),
        ("anything", "", False),
    ],
)
def test_an_answer_inside_a_text(text: str, part: str, found: bool) -> None:
    assert contains(text, part) is found


def test_answer_is_exact_or_contained() -> None:
    record = {"answer": "Britisches Pfund"}
    assert Answer()([], " britisches  Pfund. ", record) == 1.0
    assert Answer()([], "Das ist das Britische Pfund", record) == 0.0
    assert Answer(contained=0.5)([], "Es heißt Britisches Pfund.", record) == 0.5
    assert Answer(contained=0.5)([], "", record) == 0.0
    with pytest.raises(UserError, match="answer"):
        Answer().check({"answer": " . "})


def test_every_answer_of_the_sample_world_is_right_and_no_other(tmp_path: Path) -> None:
    """The reward works the answers out of the fact; the file's own answers are the judge."""
    write_sample(
        QUESTION_LANGUAGES, tmp_path / "w", documents_per_language=1, questions_per_language=16, code_bytes=0
    )
    for path in sorted((tmp_path / "w" / "questions" / "test").glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            asked = {key: record[key] for key in ("fact", "language")}
            for other in records:
                same = other["answer"] == record["answer"]
                if same:
                    assert SampleAnswer()([], other["answer"], asked) == 1.0
                elif len(other["answer"]) < len(record["answer"]):
                    assert SampleAnswer(contained=0)([], other["answer"], asked) == 0.0


def test_sample_answers_in_other_languages() -> None:
    record = {"fact": "currency:GB", "language": "de"}
    reward = SampleAnswer(contained=0.5, other_language=0.4)
    assert reward([], "Britisches Pfund", record) == 1.0
    assert reward([], "Es ist Britisches Pfund.", record) == 0.5
    assert reward([], "英国ポンド", record) == pytest.approx(0.4)
    assert SampleAnswer()([], "英国ポンド", record) == 0.0


@pytest.mark.parametrize(
    "record",
    [
        {"fact": "currency:XX", "language": "de"},
        {"language": "de"},
        {"fact": "currency:GB"},
        {"fact": "sum:1+1", "language": "und"},
    ],
)
def test_records_outside_of_the_sample_world(record: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        SampleAnswer().check(record)
