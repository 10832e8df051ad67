"""Tasks of RULER (arXiv 2404.06654) beyond retrieval: variable tracking, word counts, question answering.

| task | text | question |
|---|---|---|
| `variable-tracking` | two chains `VAR A = 12345.`, `VAR B = VAR A.`, ... | all names with the first value |
| `common-words` | a numbered list of a few frequent and many rare words | the frequent words |
| `frequent-words` | coded words, drawn by a zeta distribution | the three most frequent after the noise |
| `question-answering` | documents, one of which holds the answer | a question |

Every function of a task is pure: the same random state gives the same prompt.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError
from koine.evaluate.long_context.phrases import Phrases, draw_numbers, key_names, lead_and_answer
from koine.evaluate.long_context.prompts import (
    Insert,
    Material,
    Prompt,
    Question,
    assemble,
    room_for,
    separated,
    too_short_error,
)

WORD_COUNTS = ((10, 30, 3), (10, 10, 2), (5, 10, 2), (5, 6, 1), (3, 4, 1))
"""(common words, times each, times each of the others): RULER's own, then smaller ones for short prompts."""
# Share of the prompt that the common words may fill.
_COMMON_SHARE = 0.6
CODED_LETTERS = 6
NOISE = "..."
# Questions tried until one has room.
_TRIED = 50
ZETA = 2.0
"""Exponent: the frequency of the k-th word is in proportion to `k ** -ZETA`."""


def variable_tracking(
    material: Material, length: int, rng: random.Random, *, chains: int = 2, hops: int = 3
) -> Prompt:
    """Make a prompt with chains of `hops` assignments after the first, each in order over the haystack.

    The answer is the names of the first chain. RULER has one chain of four hops; with a second chain it is
    not enough to repeat every name.
    """
    size = hops + 1
    names = _invented(chains * size, 5, rng, string.ascii_uppercase)
    values = draw_numbers(5, chains, rng)
    inserts: list[Insert] = []
    for chain in range(chains):
        links = names[chain * size : (chain + 1) * size]
        given = [values[chain], *(f"VAR {name}" for name in links[:-1])]
        depths = sorted(rng.random() for _ in links)
        inserts += [
            Insert(f"VAR {name} = {source}.", depth, needed=chain == 0)
            for name, source, depth in zip(links, given, depths, strict=True)
        ]
    phrases, first_chain = material.phrases, names[:size]
    sentence = phrases.variables.replace("{value}", values[0])
    lead, answer = lead_and_answer(sentence, "{names}", phrases.join(first_chain))
    question = Question(
        text=phrases.ask_variables.replace("{value}", values[0]),
        lead=lead,
        answer=answer,
        expected=tuple(first_chain),
    )
    return assemble(material, length, rng, task="variable-tracking", inserts=inserts, question=question)


def _invented(count: int, letters: int, rng: random.Random, alphabet: str) -> list[str]:
    """Invent `count` different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(alphabet, k=letters))] = None
    return list(found)


def _ask_words(phrases: Phrases, words: Sequence[str]) -> Question:
    lead, answer = lead_and_answer(phrases.words, "{names}", phrases.join(words))
    return Question(text=phrases.ask_words, lead=lead, answer=answer, expected=tuple(words))


def common_words(material: Material, length: int, rng: random.Random) -> Prompt:
    """Make a prompt with a numbered list of words; the answer is the frequent ones.

    The words are the haystack's and names, then invented ones.
    """
    task = "common-words"
    pool = list(dict.fromkeys((*material.haystack.words, *key_names(material.language))))
    rng.shuffle(pool)
    coded = iter(lambda: "".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS)), None)
    words_left = itertools.chain(pool, coded)
    numbers: list[list[int]] = []

    def cost(word: str, times: int, before: int) -> int:
        """Count the tokens of a word written `times` times, after the numbers from `before` + 1 on."""
        while len(numbers) < before + times:
            numbers.append(material.encode(f" {len(numbers) + 1}."))
        return times * len(material.encode(f" {word}")) + sum(map(len, numbers[before : before + times]))

    drawn = list(itertools.islice(words_left, WORD_COUNTS[0][0]))
    for common, often, others in WORD_COUNTS:
        question = _ask_words(material.phrases, drawn[:common])
        try:
            room = room_for(material, length, question, task=task)
        except UserError:
            continue
        used = sum(cost(word, often, index * often) for index, word in enumerate(drawn[:common]))
        if used <= _COMMON_SHARE * room:
            seldom = others
            break
    else:
        raise too_short_error(task, length)
    words = drawn[:common] * often
    for word in itertools.chain(drawn[common:], words_left):
        used += cost(word, seldom, len(words))
        if used > room:
            break
        words += [word] * seldom
    rng.shuffle(words)
    pieces = [[*number, *material.encode(f" {word}")] for number, word in zip(numbers, words, strict=False)]
    return assemble(material, length, rng, task=task, question=question, pieces=pieces)


def frequent_words(material: Material, length: int, rng: random.Random, *, answers: int = 3) -> Prompt:
    """Make a prompt of coded words in random order, with frequencies in proportion to `k ** -ZETA`.

    The most frequent word is noise; the answer is the next ones.
    """
    task = "frequent-words"
    words = [NOISE, *_invented(max(64, length // 4), CODED_LETTERS, rng, string.ascii_lowercase)]
    question = _ask_words(material.phrases, words[1 : answers + 1])
    room = room_for(material, length, question, task=task)
    ids = [material.encode(f" {word}") for word in words]
    low, high = 0, room
    while low < high:  # the most draws whose tokens fit
        middle = (low + high + 1) // 2
        if (
            sum(count * len(one) for count, one in zip(zeta_counts(middle, len(ids)), ids, strict=True))
            <= room
        ):
            low = middle
        else:
            high = middle - 1
    counts = zeta_counts(low, len(ids))
    if counts[answers] <= counts[answers + 1]:
        raise too_short_error(task, length)
    pieces = [one for count, one in zip(counts, ids, strict=True) for _ in range(count)]
    rng.shuffle(pieces)
    return assemble(material, length, rng, task=task, question=question, pieces=pieces)


def zeta_counts(draws: int, words: int) -> list[int]:
    """Return the count of each word in `draws` draws: `draws * k ** -ZETA / zeta(ZETA)`, rounded down."""
    # The sum to 1,000 and the integral of the rest.
    total = sum(k**-ZETA for k in range(1, 1001)) + 1000.5 ** (1 - ZETA) / (ZETA - 1)
    return [int(draws * k**-ZETA / total) for k in range(1, words + 1)]


@dataclass(frozen=True)
class SourceQuestion:
    """A question with its right answers (one is enough), and the document that holds them."""

    document: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Questions, and documents to put around the one with the answer."""

    questions: tuple[SourceQuestion, ...]
    documents: tuple[str, ...]
    source: str


def question_answering(
    material: Material, length: int, rng: random.Random, *, questions: QuestionSet, depth: float | None = None
) -> Prompt:
    """Make a prompt with a question about one document among others, at `depth` (by default anywhere).

    Raises `UserError` where `length` has no room for any document that was tried.
    """
    task, phrases = "question-answering", material.phrases
    place = rng.random() if depth is None else depth
    for one in rng.sample(questions.questions, min(_TRIED, len(questions.questions))):
        question = Question(
            text=f"{phrases.question} {one.question}",
            lead=phrases.answer,
            answer=separated(one.answers[0], phrases),
            expected=one.answers,
            any_of=True,
        )
        insert = Insert("\n" + one.document, place)
        try:
            room_for(material, length, question, task=task, inserts=len(material.encode(insert.text)))
        except UserError:
            continue
        others = [text for text in questions.documents if text != one.document]
        rng.shuffle(others)
        pieces = (material.encode("\n" + text) for text in itertools.cycle(others))
        return assemble(material, length, rng, task=task, question=question, inserts=[insert], pieces=pieces)
    raise too_short_error(task, length)


def sample_questions(language: str) -> QuestionSet:
    """Return questions of the sample world about territories that its training documents never name.

    Sentences about other territories stand around the answer.

    Raises `UserError` for a language without questions.
    """
    from koine.data.sample import QUESTION_LANGUAGES
    from koine.data.sample.facts import facts_in
    from koine.data.sample.rendering import question, sentence

    if language not in QUESTION_LANGUAGES:
        raise UserError(
            f"the sample world has no questions in the language '{language}'",
            hint="give your own with --qa, or leave the task 'question-answering' out",
        )
    kinds = ("currency", "language")
    questions = []
    for kind in kinds:
        for fact in facts_in("heldout_territory")[kind]:
            document, pair = sentence(language, fact), question(language, fact, 0)
            if document is not None and pair is not None:
                questions.append(SourceQuestion(document, pair[0], (pair[1],)))
    others = (
        sentence(language, fact)
        for split in ("train", "recall", "heldout_territory")
        for kind in kinds
        for fact in facts_in(split)[kind]
    )
    return QuestionSet(
        tuple(questions), tuple(text for text in others if text is not None), "the sample world"
    )


def read_questions(path: str | Path, *, language: str | None = None) -> QuestionSet:
    """Read questions with `context`, `question` and `answers` (or `answer`), as in SQuAD.

    Raises `UserError` for records that lack one of them.
    """
    from koine.data.piped import is_piped
    from koine.data.records import read_records

    if not (is_piped(path) or Path(path).exists()):
        raise UserError("no such file or folder", where=path, hint="give questions with their contexts")
    languages = None if language in (None, "und") else [str(language)]
    hint = 'give each record "context", "question" and "answers"'
    records = read_records(
        path,
        fields={"text": "context"},
        languages=languages,
        split="all",
        carry=("question", "answers", "answer"),
    )
    questions: list[SourceQuestion] = []
    try:
        for record in records:
            question, answers = record.get("question"), record.get("answers") or record.get("answer")
            if isinstance(answers, dict):  # SQuAD's own form
                answers = answers.get("text")
            texts = tuple(_texts(answers))
            if not isinstance(question, str) or not texts:
                raise UserError(f"record '{record['id']}' has no question or no answers", where=path)
            questions.append(SourceQuestion(record["text"], question, texts))
    except UserError as error:
        raise UserError(error.what, where=error.where, hint=hint) from None
    if not questions:
        raise UserError(
            f"no question in the language '{language}'", where=path, hint="give another --language"
        )
    return QuestionSet(tuple(questions), tuple(dict.fromkeys(one.document for one in questions)), str(path))


def _texts(answers: object) -> Iterator[str]:
    for answer in [answers] if isinstance(answers, str) else answers if isinstance(answers, list) else []:
        if isinstance(answer, str) and answer.strip():
            yield answer
