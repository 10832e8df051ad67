"""Texts of the experiment: real books with facts hidden in them, and questions about the facts.

A fact is a remark such as `[ water street ]` between the sentences of a book: a key and its value, words of
one token each. A question is the same remark at the end of the text, and `street` is its completion. Every
text has several facts with different keys and values, so a model must find the right one: with N facts, a
value chosen at random is right once in N.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from koine.data import read_records, tokenize
from koine.files import read_json, write_json
from koine.plan import step
from koine.steps import estimates
from koine.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

HELD_OUT = 3
"""Number of books, from the last, that no model is trained on."""

WORDS = 64
"""Number of keys, and of values."""

FACTS = {"short": 6, "long": 8}


@dataclass(frozen=True)
class Prompt:
    """A text with facts and, at its end, questions with their completions.

    questions: for each, the positions of the question, of its completion, and of the fact that answers it.
    """

    tokens: list[int]
    questions: list[tuple[range, range, range]]


def books(path: Path) -> list[str]:
    """Return the text of each book, in the file's order."""
    return [record["text"] for record in read_records(path, split="all")]


def words_in(texts: Sequence[str], tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Return keys and values: the most frequent lower-case words that are one token, in turn."""
    counts = Counter(word for text in texts for word in re.findall(r"\b[a-z]{3,}\b", text))
    ordered = (word for word, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
    single = list(islice((word for word in ordered if len(tokenizer.encode(f" {word}")) == 1), 2 * WORDS))
    return single[::2], single[1::2]


def pieces_of(text: str) -> list[str]:
    """Split a text into sentences, without line breaks inside."""
    flat = " ".join(text.split())
    return [piece for piece in re.split(r"(?<=[.!?]) ", flat) if 20 <= len(piece) <= 300]


def fact(key: str, value: str) -> str:
    """Write a fact, which has the same tokens wherever it stands."""
    return f" [ {key} {value} ]"


def build(
    draw: random.Random,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    words: tuple[Sequence[str], Sequence[str]],
    *,
    length: int,
    facts: int,
    questions: int,
    depth: float | None = None,
) -> Prompt:
    """Build a text of at most `length` tokens, shorter by at most one sentence.

    sentences: the haystack, read from a random place on.
    depth: place of the first question's fact, from 0 (beginning of the haystack) to 1 (end). `None` draws it,
        as for all other facts.
    """
    keys, values = (draw.sample(list(part), facts) for part in words)
    lines = [tokenizer.encode(fact(key, value)) for key, value in zip(keys, values, strict=True)]
    asked = draw.sample(range(facts), questions)
    budget = length - 1 - sum(map(len, lines)) - sum(len(lines[index]) for index in asked)
    hay: list[list[int]] = []
    place, used = draw.randrange(len(sentences)), 0
    while True:
        ids = tokenizer.encode(" " + sentences[place % len(sentences)])
        if used + len(ids) > budget:
            break
        hay.append(ids)
        used, place = used + len(ids), place + 1
    places = [draw.randrange(len(hay) + 1) for _ in lines]
    if depth is not None:
        places[asked[0]] = round(depth * len(hay))
    order = sorted(range(facts), key=lambda index: (places[index], index))
    tokens, where = [tokenizer.bos_id], {}
    for number in range(len(hay) + 1):
        for index in order:
            if places[index] == number:
                where[index] = range(len(tokens), len(tokens) + len(lines[index]))
                tokens += lines[index]
        if number < len(hay):
            tokens += hay[number]
    found = []
    for index in asked:
        start, end = len(tokens), len(tokens) + len(lines[index])
        tokens += lines[index]
        value = start + len(tokenizer.encode(f" [ {keys[index]} {values[index]}")) - 1
        found.append((range(start, end), range(value, value + 1), where[index]))
    return Prompt(tokens, found)


@step(version="1", estimate=estimates.comparison)
def needle_corpus(
    texts: Path,
    *,
    vocabulary: int,
    short: int,
    long: int,
    documents: int,
    long_documents: int,
    seed: int,
    out: Path,
) -> None:
    """Write a tokenizer of the books and token shards.

    `books`, `pairs` and `short` are for the first stage, `short` and `long` for the second.
    """
    all_books = books(texts)
    train = all_books[:-HELD_OUT]
    tokenizer = train_tokenizer(
        {"en": lambda: train}, vocab_size=vocabulary, scheme="natural", english_share=None, min_frequency=2
    )
    tokenizer.save(out / "tokenizer")
    words = words_in(train, tokenizer)
    write_json(out / "words.json", words)
    sentences = [piece for text in train for piece in pieces_of(text)]
    draw = random.Random(seed)
    parts: dict[str, list[dict[str, Any]]] = {
        # A token has at least one character, so each of these pieces fits into a short row.
        "books": [{"text": text, "id": f"book-{number}"} for number, text in enumerate(cut(train, short))]
    }
    parts["pairs"] = [
        {"text": pairs(draw, words), "id": f"pairs-{number}"} for number in range(4 * documents)
    ]
    for name, length, count in (("short", short, documents), ("long", long, long_documents)):
        parts[name] = []
        for number in range(count):
            prompt = build(
                draw, tokenizer, sentences, words, length=length - 1, facts=FACTS[name], questions=FACTS[name]
            )
            text = tokenizer.decode(prompt.tokens[1:])
            parts[name].append({"text": text, "id": f"{name}-{number}"})
    for name, records in parts.items():
        file = out / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(
                json.dumps({**record, "language": "en", "domain": name}, ensure_ascii=False) + "\n"
                for record in records
            )
        tokenize(file, out / "tokenizer", out=out / "tokens" / name, workers=1)
        file.unlink()
    shutil.rmtree(out / "scratch", ignore_errors=True)


def pairs(draw: random.Random, words: tuple[Sequence[str], Sequence[str]]) -> str:
    """Write two to four facts and the questions about them, without a haystack."""
    facts = draw.randint(2, 4)
    lines = [
        fact(key, value)
        for key, value in zip(*(draw.sample(list(part), facts) for part in words), strict=True)
    ]
    return "".join(lines + draw.sample(lines, facts)).strip()


def cut(texts: Sequence[str], size: int) -> Iterable[str]:
    """Cut texts into pieces of `size` characters."""
    return (text[start : start + size] for text in texts for start in range(0, len(text), size))


def prompts(
    corpus: Path,
    texts: Path,
    *,
    length: int,
    count: int,
    questions: int,
    facts: int,
    seed: int,
    depth: float | None = None,
) -> list[Prompt]:
    """Build test prompts from the held-out books."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    keys, values = read_json(corpus / "words.json")
    sentences = [piece for text in books(texts)[-HELD_OUT:] for piece in pieces_of(text)]
    draw = random.Random(seed * 1_000_003 + length)
    return [
        build(
            draw,
            tokenizer,
            sentences,
            (keys, values),
            length=length,
            facts=facts,
            questions=questions,
            depth=depth,
        )
        for _ in range(count)
    ]


def held_out_text(texts: Path, limit: int) -> list[str]:
    """Return pieces of the held-out books, for bits per byte."""
    return list(islice(cut(books(texts)[-HELD_OUT:], 300), limit))
