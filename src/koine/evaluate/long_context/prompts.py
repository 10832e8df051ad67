"""Prompts of exact length, with the token spans of their parts.

    prefix | haystack, with inserts between its pieces | question | turn markers | lead | answer

Each part is encoded separately, so that the spans are exact. `prefix` is BOS, or the head of a user's turn.
The lead is the beginning of the sentence that the answer completes.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from koine.errors import UserError
from koine.evaluate.long_context.haystack import Encode, Haystack, fill
from koine.evaluate.long_context.phrases import Phrases, phrases_of

if TYPE_CHECKING:
    from koine.tokenizer import Tokenizer

Span = tuple[int, int]
"""Half-open, in tokens."""


@dataclass(frozen=True)
class Insert:
    """A sentence for the haystack, at a depth from 0 to 1; needed: whether it holds the answer."""

    text: str
    depth: float
    needed: bool = True


@dataclass(frozen=True)
class Prompt:
    """A prompt with its right answer.

    Attributes:
        task: its name.
        length: tokens that prompt and answer were made to have together.
        tokens: the prompt, which ends where the answer begins.
        answer: tokens of the right answer, as they continue the prompt.
        expected: strings that an output must contain.
        needles: spans of the inserts that hold the answer.
        distractors: spans of the other inserts.
        question: from the question to the end of the prompt.
        depth: of the first needle, as a share of the haystack; `None` without inserts.
        any_of: one of `expected` is enough.
    """

    task: str
    length: int
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    expected: tuple[str, ...]
    needles: tuple[Span, ...]
    distractors: tuple[Span, ...]
    question: Span
    depth: float | None
    any_of: bool = False


@dataclass(frozen=True)
class Material:
    """Everything that prompts of a tokenizer and a language are made of.

    Attributes:
        encode: text to ids, without special tokens.
        decode: ids to text.
        haystack: text to hide needles in.
        language: of names and phrases.
        phrases: of the language.
        prefix: ids before the text (BOS).
        suffix: ids between question and lead: end of the user's turn and head of the assistant's; empty for
            base models.
    """

    encode: Encode
    decode: Callable[[Sequence[int]], str]
    haystack: Haystack
    language: str
    phrases: Phrases
    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()

    def ends_on_character(self, ids: Sequence[int]) -> bool:
        """Return whether the ids end at the end of a character."""
        return not self.decode(ids).endswith("\ufffd")


def make_material(
    tokenizer: Tokenizer, haystack: Haystack, *, language: str | None = None, chat: bool = False
) -> Material:
    """Collect the material for a tokenizer.

    language: of names and phrases, by default the haystack's. chat: whether prompts are chats.
    """
    prefix, suffix = chat_frame(tokenizer) if chat else ((tokenizer.bos_id,), ())
    code = haystack.language if language is None else language
    return Material(
        encode=tokenizer.encode,
        decode=tokenizer.decode,
        haystack=haystack,
        language=code,
        phrases=phrases_of(code),
        prefix=prefix,
        suffix=suffix,
    )


def chat_frame(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the chat template puts before and after a user's message.

    They are what two different messages have in common.
    """
    first, second = (
        tokenizer.encode_messages([{"role": "user", "content": text}], generation_prompt=True)[0]
        for text in ("0", "#")
    )
    head = next(index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    tail = next(
        index for index, (a, b) in enumerate(zip(reversed(first), reversed(second), strict=False)) if a != b
    )
    return tuple(first[:head]), tuple(first[len(first) - tail :])


@dataclass(frozen=True, kw_only=True)
class Question:
    """The end of a prompt: question, beginning of the sentence that answers it (lead), and its rest (answer).

    expected, any_of: as in `Prompt`.
    """

    text: str
    lead: str
    answer: str
    expected: tuple[str, ...]
    any_of: bool = False


def room_for(material: Material, length: int, question: Question, *, task: str, inserts: int = 0) -> int:
    """Return the number of tokens left for the haystack; inserts: tokens of the inserts.

    Raises `UserError` where the other parts alone are longer than `length`.
    """
    parts = (material.prefix, material.suffix, *_end_tokens(material, question))
    fixed = inserts + sum(map(len, parts))
    if fixed > length:
        raise too_short_error(task, length, needed=fixed)
    return length - fixed


def too_short_error(task: str, length: int, *, needed: int | None = None) -> UserError:
    """Return the error for a length that has no room for a task."""
    return UserError(
        f"a prompt of {length} tokens has no room for the task '{task}'"
        + ("" if needed is None else f", which needs {needed}"),
        where="--lengths",
        hint="give longer ones, or leave the task out with --tasks",
    )


def _end_tokens(material: Material, question: Question) -> tuple[list[int], list[int], list[int]]:
    """Encode question, lead and answer."""
    encode = material.encode
    # The lead is on a line of its own, or at the beginning of the assistant's turn.
    lead = question.lead if material.suffix else "\n" + question.lead
    return encode("\n" + question.text), encode(lead), encode(question.answer)


def assemble(
    material: Material,
    length: int,
    rng: random.Random,
    *,
    task: str,
    question: Question,
    inserts: Sequence[Insert] = (),
    pieces: Iterable[Sequence[int]] | None = None,
) -> Prompt:
    """Assemble a prompt of `length` tokens, answer included.

    It is a few tokens shorter where the last piece would end within a character. An insert goes to the edge
    between pieces that is nearest to its depth.

    Args:
        material: haystack, phrases and tokenizer.
        length: tokens of prompt and answer.
        rng: chooses the beginning of the haystack.
        task: name of the task.
        question: end of the prompt.
        inserts: needles and distractors.
        pieces: token pieces in place of the haystack's. Where they end early, the prompt is shorter.

    Raises:
        UserError: where `length` has no room for the other parts.
    """
    placed = sorted(inserts, key=lambda one: one.depth)
    encoded = [material.encode(separated(one.text, material.phrases)) for one in placed]
    room = room_for(material, length, question, task=task, inserts=sum(map(len, encoded)))
    filler = (
        material.haystack.cut(room, rng, ends_on_character=material.ends_on_character)
        if pieces is None
        else fill(pieces, room, ends_on_character=material.ends_on_character)
    )
    edges = [0, *itertools.accumulate(map(len, filler))]
    total = edges[-1]
    places = [_nearest(edges, one.depth * total) for one in placed]
    tokens = list(material.prefix)
    spans: list[tuple[Span, Insert, float]] = []
    waiting = list(zip(places, placed, encoded, strict=True))
    for at in range(len(edges)):
        while waiting and waiting[0][0] == at:
            _, one, ids = waiting.pop(0)
            spans.append(((len(tokens), len(tokens) + len(ids)), one, edges[at] / max(total, 1)))
            tokens += ids
        if at < len(filler):
            tokens += filler[at]
    start = len(tokens)
    question_ids, lead_ids, answer_ids = _end_tokens(material, question)
    tokens += [*question_ids, *material.suffix, *lead_ids]
    needles = [(span, depth) for span, one, depth in spans if one.needed]
    return Prompt(
        task=task,
        length=length,
        tokens=tuple(tokens),
        answer=tuple(answer_ids),
        expected=question.expected,
        needles=tuple(span for span, _ in needles),
        distractors=tuple(span for span, one, _ in spans if not one.needed),
        question=(start, len(tokens)),
        depth=needles[0][1] if needles else None,
        any_of=question.any_of,
    )


def _nearest(edges: Sequence[int], target: float) -> int:
    """Return the index of the edge (ascending) nearest to `target`."""
    after = min(bisect.bisect_left(edges, target), len(edges) - 1)
    return after - 1 if after and target - edges[after - 1] <= edges[after] - target else after


def separated(text: str, phrases: Phrases) -> str:
    """Put before a text the space that the language has between sentences."""
    return text if text[:1].isspace() or phrases.code in ("zh", "ja") else " " + text
