"""Needle in a haystack: the retrieval tasks of RULER (arXiv 2404.06654).

| task | in the haystack | question |
|---|---|---|
| `single` | one needle at a depth | its value |
| `multi-key` | that needle and three others with other keys | its value |
| `multi-key-full` | only needles | the value of the one at the depth |
| `multi-value` | four needles with the same key | all values |
| `multi-query` | four needles with different keys | all values |
| `multi-needle` | three needles, evenly from the depth to the end | all values |

Keys are names in the language, values are numbers. Every function is pure: the same random state gives the
same prompt.
"""

from __future__ import annotations

import random

from koine.evaluate.long_context.phrases import Phrases, draw_keys, draw_numbers, lead_and_answer
from koine.evaluate.long_context.prompts import Insert, Material, Prompt, Question, assemble, separated

DIGITS = 7
"""Digits of a value, as in RULER."""


def fact(phrases: Phrases, key: str, value: str) -> str:
    """Write a needle: a sentence that gives a key its value."""
    return phrases.fact.replace("{key}", phrases.quote([key])).replace("{value}", value)


def _ask_one(phrases: Phrases, key: str, value: str) -> Question:
    quoted = phrases.quote([key])
    lead, answer = lead_and_answer(phrases.fact.replace("{key}", quoted), "{value}", value)
    return Question(text=phrases.ask.replace("{key}", quoted), lead=lead, answer=answer, expected=(value,))


def _ask_many(phrases: Phrases, keys: list[str], values: list[str]) -> Question:
    quoted = phrases.quote(keys)
    lead, answer = lead_and_answer(phrases.facts.replace("{keys}", quoted), "{values}", phrases.join(values))
    return Question(
        text=phrases.ask_facts.replace("{keys}", quoted), lead=lead, answer=answer, expected=tuple(values)
    )


def single(
    material: Material, length: int, rng: random.Random, *, depth: float = 0.5, digits: int = DIGITS
) -> Prompt:
    """Make a prompt with one needle at `depth`."""
    return multi_key(material, length, rng, depth=depth, digits=digits, distractors=0, task="single")


def multi_key(
    material: Material,
    length: int,
    rng: random.Random,
    *,
    depth: float = 0.5,
    digits: int = DIGITS,
    distractors: int = 3,
    task: str = "multi-key",
) -> Prompt:
    """Make a prompt with one needle at `depth`, and distractors with other keys anywhere."""
    phrases = material.phrases
    keys = draw_keys(material.language, distractors + 1, rng)
    values = draw_numbers(digits, distractors + 1, rng)
    inserts = [Insert(fact(phrases, keys[0], values[0]), depth)] + [
        Insert(fact(phrases, key, value), rng.random(), needed=False)
        for key, value in zip(keys[1:], values[1:], strict=True)
    ]
    question = _ask_one(phrases, keys[0], values[0])
    return assemble(material, length, rng, task=task, inserts=inserts, question=question)


def multi_key_full(
    material: Material, length: int, rng: random.Random, *, depth: float = 0.5, digits: int = DIGITS
) -> Prompt:
    """Make a prompt of needles only; the question is about the one at `depth`."""
    phrases = material.phrases
    # A needle has its value and at least two more tokens, so these are more than enough.
    count = length // 8 + 2
    keys, values = draw_keys(material.language, count, rng), draw_numbers(digits, count, rng)
    pieces = [
        material.encode(separated(fact(phrases, key, value), phrases))
        for key, value in zip(keys[1:], values[1:], strict=True)
    ]
    inserts = [Insert(fact(phrases, keys[0], values[0]), depth)]
    question = _ask_one(phrases, keys[0], values[0])
    return assemble(
        material,
        length,
        rng,
        task="multi-key-full",
        inserts=inserts,
        question=question,
        pieces=pieces,
    )


def multi_value(
    material: Material, length: int, rng: random.Random, *, count: int = 4, digits: int = DIGITS
) -> Prompt:
    """Make a prompt with `count` needles of one key; the answer is all values, in the order of the text."""
    phrases = material.phrases
    key = draw_keys(material.language, 1, rng)[0]
    values = draw_numbers(digits, count, rng)
    depths = sorted(rng.random() for _ in range(count))
    inserts = [Insert(fact(phrases, key, value), at) for value, at in zip(values, depths, strict=True)]
    question = _ask_many(phrases, [key], values)
    return assemble(material, length, rng, task="multi-value", inserts=inserts, question=question)


def multi_query(
    material: Material,
    length: int,
    rng: random.Random,
    *,
    count: int = 4,
    digits: int = DIGITS,
    depths: list[float] | None = None,
    task: str = "multi-query",
) -> Prompt:
    """Make a prompt with `count` needles of different keys, anywhere or at `depths`.

    The answer is all values, in a random order of the keys.
    """
    phrases = material.phrases
    keys, values = draw_keys(material.language, count, rng), draw_numbers(digits, count, rng)
    where = [rng.random() for _ in range(count)] if depths is None else depths
    inserts = [
        Insert(fact(phrases, key, value), at) for key, value, at in zip(keys, values, where, strict=True)
    ]
    order = rng.sample(range(count), count)
    keys, values = [keys[index] for index in order], [values[index] for index in order]
    question = _ask_many(phrases, keys, values)
    return assemble(material, length, rng, task=task, inserts=inserts, question=question)


def multi_needle(
    material: Material,
    length: int,
    rng: random.Random,
    *,
    depth: float = 0.0,
    count: int = 3,
    digits: int = DIGITS,
) -> Prompt:
    """Make a prompt with `count` needles, evenly from `depth` to the end; the answer is all values."""
    depths = [depth + (1.0 - depth) * index / count for index in range(count)]
    return multi_query(material, length, rng, count=count, digits=digits, depths=depths, task="multi-needle")
