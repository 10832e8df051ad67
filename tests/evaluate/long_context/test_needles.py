"""Needles at their depths, with their values."""

from __future__ import annotations

import re

import pytest

from koine.evaluate.long_context.prompts import Material
from koine.evaluate.long_context.tasks import DEPTH_TASKS
from koine.tokenizer import Tokenizer
from tests.evaluate.long_context.conftest import LANGUAGES, prompt_of, text_of


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", DEPTH_TASKS)
def test_needles_are_where_they_should_be(
    words: Tokenizer, materials: dict[str, Material], code: str, depth: float, task: str
) -> None:
    material = materials[code]
    prompt = prompt_of(task, material, depth=depth)
    spans = [*prompt.needles, *prompt.distractors]
    begin, _, end = material.phrases.fact.partition("{value}")
    for span, value in zip(
        sorted(prompt.needles), sorted(prompt.expected, key=words.decode(prompt.tokens).index), strict=True
    ):
        needle = text_of(words, prompt.tokens[slice(*span)]).strip()
        assert needle.endswith(value + end)
        assert re.fullmatch(
            ".+".join(map(re.escape, begin.split("{key}"))) + value + re.escape(end), needle
        ), needle
    hay = sum(
        1 for at in range(1, prompt.question[0]) if not any(start <= at < stop for start, stop in spans)
    )
    before = sum(
        1
        for at in range(1, min(start for start, _ in prompt.needles))
        if not any(start <= at < stop for start, stop in spans)
    )
    pieces = material.haystack.pieces
    longest = max(map(len, pieces)) if task != "multi-key-full" else 60
    assert abs(before - depth * hay) <= longest / 2 + 1
    assert prompt.depth == pytest.approx(before / hay)


def test_many_needles(words: Tokenizer, materials: dict[str, Material]) -> None:
    value, query = (prompt_of(task, materials["en"]) for task in ("multi-value", "multi-query"))
    for prompt in (value, query):
        assert len(prompt.needles) == len(set(prompt.expected)) == 4
        assert words.decode(prompt.answer).strip() == ", ".join(prompt.expected)
    texts = [[text_of(words, p.tokens[slice(*span)]) for span in p.needles] for p in (value, query)]
    keys = [{text.split('"')[1] for text in group} for group in texts]
    assert [len(group) for group in keys] == [1, 4]
    assert [text.strip(" .").rpartition(" ")[2] for text in texts[0]] == list(value.expected)
