"""Variable tracking, word counts and questions, against the text of the prompt."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from koine.errors import UserError
from koine.evaluate.long_context import ruler
from koine.evaluate.long_context.haystack import (
    sample_texts,
    split_pieces,
)
from koine.evaluate.long_context.prompts import Material
from koine.tokenizer import Tokenizer
from tests.evaluate.long_context.conftest import LANGUAGES, prompt_of, text_of


def test_variables_hold_what_is_asked(words: Tokenizer, materials: dict[str, Material]) -> None:
    """The assignments in the text, carried out in its order, give the answer."""
    for number in range(5):
        prompt = prompt_of("variable-tracking", materials["en"], number=number)
        text = text_of(words, prompt.tokens)
        held: dict[str, str] = {}
        for name, other, literal in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
            held[name] = literal or held[other]
        asked = re.search(r"have the value (\d+)", text).group(1)  # type: ignore[union-attr]
        assert [name for name, value in held.items() if value == asked] == list(prompt.expected)
        assert len(set(held.values())) == 2
        assert len(held) == 8
        assert len(prompt.needles) == 4


@pytest.mark.parametrize("code", LANGUAGES)
def test_common_words_are_the_most_common(
    words: Tokenizer, materials: dict[str, Material], code: str
) -> None:
    prompt = prompt_of("common-words", materials[code])
    listed = text_of(words, prompt.tokens[1 : prompt.question[0]])
    items = re.findall(r" (\d+)\. (.+?)(?= \d+\. |$)", listed)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    counts = Counter(word for _, word in items).most_common()
    asked = len(prompt.expected)
    assert {word for word, _ in counts[:asked]} == set(prompt.expected)
    assert len({count for _, count in counts[:asked]}) == 1
    assert {count for _, count in counts[asked:]} < {1, 2, 3}
    assert len(counts) > 2 * asked


def test_frequent_words_are_the_most_frequent(words: Tokenizer, materials: dict[str, Material]) -> None:
    prompt = prompt_of("frequent-words", materials["en"])
    counts = Counter(text_of(words, prompt.tokens[1 : prompt.question[0]]).split()).most_common()
    assert [word for word, _ in counts[:4]] == ["...", *prompt.expected]
    assert counts[0][1] == pytest.approx(4 * counts[1][1], abs=4)  # k ** -2
    assert counts[3][1] > counts[4][1]


def test_zeta_counts() -> None:
    # zeta(2) = pi^2 / 6
    assert ruler.zeta_counts(10_000, 3) == [int(60_000 / math.pi**2 / k**2) for k in (1, 2, 3)]


def test_questions_are_answered_by_their_document(words: Tokenizer, materials: dict[str, Material]) -> None:
    prompt = prompt_of("question-answering", materials["de"])
    (span,) = prompt.needles
    document = text_of(words, prompt.tokens[slice(*span)]).strip()
    assert prompt.expected[0] in document
    assert text_of(words, prompt.tokens).count(document) == 1
    assert prompt.any_of
    # Facts about these territories are in no training document of the sample world.
    asked = {one.document for one in ruler.sample_questions("de").questions}
    assert document in asked
    assert not asked & {line for text in sample_texts("de") for line in split_pieces(text)}


def test_questions_from_a_file(words: Tokenizer, materials: dict[str, Material], tmp_path: Path) -> None:
    rows = [
        {
            "context": f"The colour of box {number} is colour{number}.",
            "question": f"Which colour has box {number}?",
        }
        for number in range(30)
    ]
    rows = [{**row, "answers": [f"colour{number}", "none"]} for number, row in enumerate(rows)]
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = ruler.read_questions(path)
    prompt = ruler.question_answering(materials["en"], 200, random.Random(0), questions=questions, depth=0.0)
    text = text_of(words, prompt.tokens)
    number = re.search(r"Which colour has box (\d+)", text).group(1)  # type: ignore[union-attr]
    assert prompt.expected == (f"colour{number}", "none")
    assert text.startswith(f"\nThe colour of box {number} is")
    path.write_text(json.dumps({"context": "a", "question": "b"}) + "\n")
    with pytest.raises(UserError, match="no question or no answers"):
        ruler.read_questions(path)
