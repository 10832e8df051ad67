"""Prompts of exact length with exact spans."""

from __future__ import annotations

import random
import re

import pytest

from koine.evaluate.long_context import needles
from koine.evaluate.long_context.prompts import Material, chat_frame, make_material
from koine.evaluate.long_context.tasks import TASKS
from koine.tokenizer import Tokenizer
from tests.evaluate.long_context.conftest import LANGUAGES, LENGTH, prompt_of, text_of


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("task", TASKS)
def test_prompts_keep_to_their_length(materials: dict[str, Material], code: str, task: str) -> None:
    prompt = prompt_of(task, materials[code])
    total = len(prompt.tokens) + len(prompt.answer)
    # Lists of words end with a whole word; other prompts lose at most the tokens of one character.
    least = 0.75 * LENGTH if task.endswith("-words") else LENGTH - 3
    assert least <= total <= LENGTH
    assert prompt == prompt_of(task, materials[code])
    assert prompt != prompt_of(task, materials[code], number=1)


def test_the_rest_of_the_prompt_is_the_haystack(words: Tokenizer, materials: dict[str, Material]) -> None:
    material = materials["de"]
    prompt = prompt_of("multi-key", material)
    assert len(prompt.needles) == 1
    assert len(prompt.distractors) == 3
    inserted = {at for span in (*prompt.needles, *prompt.distractors) for at in range(*span)}
    rest = [prompt.tokens[at] for at in range(1, prompt.question[0]) if at not in inserted]
    whole = [token for piece in material.haystack.pieces for token in piece]
    assert words.decode(rest) in words.decode(whole + whole)
    assert prompt.tokens[0] == words.bos_id
    question = text_of(words, prompt.tokens[slice(*prompt.question)])
    key = re.search("„(.+?)“", question).group(1)  # type: ignore[union-attr]
    assert question == (f"\nWie lautet die geheime Nummer von „{key}“?\nDie geheime Nummer von „{key}“ ist")
    assert words.decode(prompt.answer) == f" {prompt.expected[0]}"
    needle = text_of(words, prompt.tokens[slice(*prompt.needles[0])])
    assert needle == f" Die geheime Nummer von „{key}“ ist {prompt.expected[0]}."


def test_prompts_in_the_chat_template(words: Tokenizer, materials: dict[str, Material]) -> None:
    head, tail = chat_frame(words)
    text = words.encode("Wie geht es?")
    asked, _ = words.encode_messages([{"role": "user", "content": "Wie geht es?"}], generation_prompt=True)
    assert [*head, *text, *tail] == asked
    material = make_material(words, materials["de"].haystack, chat=True)
    prompt = needles.single(material, LENGTH, random.Random(0))
    assert len(prompt.tokens) + len(prompt.answer) == LENGTH
    assert prompt.tokens[: len(head)] == head
    written = words.decode(prompt.tokens, skip_special=False)
    assert re.search(r"\?<\|END_OF_TURN_TOKEN\|>.*<\|CHATBOT_TOKEN\|>Die geheime Nummer .* ist$", written)
