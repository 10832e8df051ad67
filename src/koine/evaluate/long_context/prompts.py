"""A prompt of exact length, which knows where everything in it stands.

    prefix | haystack, with inserts between its pieces | question | turn markers | lead | answer

Every part is encoded by itself, so that the spans are exact. `prefix` is BOS, or the head of a user's turn; the lead is the beginning of
the sentence that the answer completes.
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
    """A sentence for the haystack. depth: 0 at its beginning, 1 at its end. asked: whether the answer is in it."""

    text: str
    depth: float
    asked: bool = True


@dataclass(frozen=True)
class Prompt:
    """What a model reads, and what it should write.

    tokens: the prompt, which ends where the answer begins. answer: tokens of the right answer, as a text that continues the prompt.
    expected: the strings that the answer must hold (`any_of`: at least one of them).
    needles, distractors: spans of the inserts that the answer needs, and of the others. question: from the question to the end of the
    prompt. depth: of the first insert that is asked for, as a share of the haystack; None without inserts.
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
    """What prompts are made of.

    encode: text to ids, without special tokens. decode: back. language: of names and phrases. prefix: ids before the text (BOS). suffix: ids between the question and
    the lead (the end of the user's turn and the head of the assistant's; empty for base models).
    """

    encode: Encode
    decode: Callable[[Sequence[int]], str]
    haystack: Haystack
    language: str
    phrases: Phrases
    prefix: tuple[int, ...]
    suffix: tuple[int, ...] = ()

    def intact(self, ids: Sequence[int]) -> bool:
        """Whether ids are whole characters."""
        return not self.decode(ids).endswith("\ufffd")


def material_of(
    tokenizer: Tokenizer, haystack: Haystack, *, language: str | None = None, chat: bool = False
) -> Material:
    """Material for a tokenizer. language: of names and phrases, by default the haystack's. chat: within turns of a user and the assistant."""
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
    """What the chat template puts before and behind a user's message: what two different messages have in common."""
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
    """The end of a prompt: the question, the beginning of the sentence that answers it, and how that goes on.

    expected, any_of: as in `Prompt`.
    """

    text: str
    lead: str
    answer: str
    expected: tuple[str, ...]
    any_of: bool = False


def room_for(material: Material, length: int, question: Question, *, task: str, inserts: int = 0) -> int:
    """Tokens that are left for the haystack, where the inserts take so many.

    Raises `UserError` where `length` has no room for what must be there.
    """
    asked, led, answered = _end_tokens(material, question)
    parts = (material.prefix, material.suffix, asked, led, answered)
    fixed = inserts + sum(map(len, parts))
    if fixed > length:
        raise too_short(task, length, needed=fixed)
    return length - fixed


def too_short(task: str, length: int, *, needed: int | None = None) -> UserError:
    """What is said where a length has no room for a task."""
    return UserError(
        f"a prompt of {length} tokens has no room for the task '{task}'"
        + ("" if needed is None else f", which needs {needed}"),
        where="--lengths",
        hint="give longer ones, or leave the task out with --tasks",
    )


def _end_tokens(material: Material, question: Question) -> tuple[list[int], list[int], list[int]]:
    encode = material.encode
    # A lead stands on a line of its own, or at the very beginning of the assistant's turn.
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
    """A prompt of `length` tokens, its answer included; a few fewer where the last piece would end within a character.

    pieces: token pieces in place of the haystack's; where they end early, the prompt is shorter. An insert stands at the edge between
    pieces that is nearest to its depth.
    Raises `UserError` where `length` has no room for the parts that must be there.
    """
    placed = sorted(inserts, key=lambda one: one.depth)
    encoded = [material.encode(separated(one.text, material.phrases)) for one in placed]
    room = room_for(material, length, question, task=task, inserts=sum(map(len, encoded)))
    hay = (
        material.haystack.cut(room, rng, intact=material.intact)
        if pieces is None
        else fill(pieces, room, intact=material.intact)
    )
    edges = [0, *itertools.accumulate(map(len, hay))]
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
        if at < len(hay):
            tokens += hay[at]
    start = len(tokens)
    asked, led, answered = _end_tokens(material, question)
    tokens += [*asked, *material.suffix, *led]
    wanted = [(span, depth) for span, one, depth in spans if one.asked]
    return Prompt(
        task=task,
        length=length,
        tokens=tuple(tokens),
        answer=tuple(answered),
        expected=question.expected,
        needles=tuple(span for span, _ in wanted),
        distractors=tuple(span for span, one, _ in spans if not one.asked),
        question=(start, len(tokens)),
        depth=wanted[0][1] if wanted else None,
        any_of=question.any_of,
    )


def _nearest(edges: Sequence[int], target: float) -> int:
    """Index of the edge (ascending) nearest to `target`."""
    after = min(bisect.bisect_left(edges, target), len(edges) - 1)
    return after - 1 if after and target - edges[after - 1] <= edges[after] - target else after


def separated(text: str, phrases: Phrases) -> str:
    """A text that follows another, with the space that the language puts between them."""
    return text if text[:1].isspace() or phrases.code in ("zh", "ja") else " " + text
