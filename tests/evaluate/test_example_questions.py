"""Example questions: only what was answered right, the sure ones first, each unlike those before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from koine.errors import UserError
from koine.evaluate.example_questions import (
    FILE,
    Example,
    Examples,
    candidates,
    choose,
    example_of,
    read_examples,
)


def example(question: str, language: str, kind: str = "currency", probability: float = 0.9) -> Example:
    return Example(question, f"answer to {question}", language, kind, probability)


def test_a_question_of_one_message_is_an_example() -> None:
    asked = {"role": "user", "content": "What is\nthe currency? "}
    answered = {"role": "assistant", "content": "Yen"}
    record = {"messages": [asked, answered], "language": "en", "kind": "currency"}
    assert example_of(record, " Yen\n") == Example("What is the currency?", "Yen", "en", "currency")
    assert example_of({"messages": [asked]}, "Yen") == Example("What is the currency?", "Yen", "und", "")
    assert example_of({"messages": [{"role": "system", "content": "Short."}, asked]}, "Yen") is None
    assert example_of({"messages": [asked, answered, asked]}, "Yen") is None


def test_each_is_unlike_those_before_it() -> None:
    """Another language in another cluster, and another kind, before a second one of the same."""
    found = [
        example("What is the currency of Japan?", "en"),
        example("What is the language of Brazil?", "en", "language"),
        example("Welche Währung hat Japan?", "de"),
        example("Welcher Monat folgt auf Mai?", "de", "month"),
        example("日本の通貨は何ですか。", "ja"),
        example("ブラジルの言語は何ですか。", "ja", "language"),
    ]
    chosen = choose(found, ("en", "de", "ja"), 3)
    assert [(one.language, one.kind) for one in chosen] == [
        ("en", "currency"),
        ("ja", "language"),
        ("de", "month"),
    ]


def test_sentences_with_sure_answers_come_first() -> None:
    found = [
        example("Country: Japan. What is its currency?", "en"),
        example("What is the currency of Chad?", "en", probability=0.1),
        example("What is the currency of Japan?", "en", probability=0.85),
        example("What is 3 + 4?", "en", "sum", probability=0.99),
    ]
    assert choose(found, ("en",), 1) == (found[2],)


def test_fewer_right_answers_give_fewer_examples() -> None:
    found = [example("What is the currency of Japan?", "xx-unknown")]
    assert choose(found, (), 3) == tuple(found)
    assert choose([], ("en",), 3) == ()


def test_candidates_are_sentences_of_all_kinds_of_each_language() -> None:
    found = [
        *(example(f"{number} + 1?", "en", "sum") for number in range(5)),
        *(example(f"Currency of {name}?", "en") for name in "abc"),
        example("Sprache von a?", "de", "language"),
        example("Language of a?", "en", "language"),
    ]
    kept = candidates(found, most=3)
    assert {one.question for one in kept if one.language == "en"} == {
        "Currency of a?",
        "Currency of b?",
        "Language of a?",
    }
    assert [one.question for one in kept if one.language == "de"] == ["Sprache von a?"]


def test_a_folder_keeps_them(tmp_path: Path) -> None:
    assert read_examples(tmp_path) is None
    examples = Examples(960, 512, (example("¿Qué moneda tiene Japón?", "es"),))
    examples.save(tmp_path)
    assert read_examples(tmp_path) == examples
    (tmp_path / FILE).write_text('{"asked": 3, "right": 1, "examples": [{"question": 7}]}')
    with pytest.raises(UserError, match="an example: 'question'|an example"):
        read_examples(tmp_path)
