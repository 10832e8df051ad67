"""A prompt of exact length, which knows where everything in it stands.

    prefix | haystack, with inserts between its pieces | question | turn markers | lead | answer

Every part is encoded by itself, so that the spans are exact. `prefix` is BOS, or the head of a user's turn; the lead is the beginning of
the sentence that the answer completes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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
    head = next(
        index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b
    )
    tail = next(
        index for index, (a, b) in enumerate(zip(reversed(first), reversed(second), strict=False)) if a != b
    )
    return tuple(first[:head]), tuple(first[len(first) - tail :])


def assemble(
    material: Material,
    length: int,
    rng: random.Random,
    *,
    task: str,
    inserts: Sequence[Insert],
    question: str,
    lead: str,
    answer: str,
    expected: Sequence[str],
    pieces: Sequence[Sequence[int]] | None = None,
    any_of: bool = False,
) -> Prompt:
    """A prompt of `length` tokens, its answer included; a few fewer where the last piece would end within a character.

    pieces: token pieces in place of the haystack's, from the first on. An insert stands at the edge between pieces nearest to its depth.
    Raises `UserError` where `length` has no room for the parts that must be there.
    """
    encode = material.encode
    placed = sorted(inserts, key=lambda one: one.depth)
    encoded = [encode(separated(one.text, material.phrases)) for one in placed]
    asked, led, answered = encode("\n" + question), encode(spaced(lead, material)), encode(answer)
    fixed = sum(map(len, (material.prefix, material.suffix, asked, led, answered, *encoded)))
    room = length - fixed
    if room < 0:
        raise UserError(
            f"a prompt of the task '{task}' needs {fixed} tokens and the length is {length}",
            where="--lengths",
            mend=f"give at least {fixed + fixed // 4}, or leave the task out with --tasks",
        )
    hay = (
        material.haystack.cut(room, rng, intact=material.intact)
        if pieces is None
        else fill(pieces, room, 0, intact=material.intact)
    )
    tokens = list(material.prefix)
    spans: list[tuple[int, int, Insert, float]] = []
    edges = [0]
    for piece in hay:
        edges.append(edges[-1] + len(piece))
    total = edges[-1]
    places = [min(range(len(edges)), key=lambda at: abs(edges[at] - one.depth * total)) for one in placed]
    for at in range(len(edges)):
        for one, ids, place in zip(placed, encoded, places, strict=True):
            if place == at:
                spans.append((len(tokens), len(tokens) + len(ids), one, edges[at] / max(total, 1)))
                tokens += ids
        if at < len(hay):
            tokens += hay[at]
    start = len(tokens)
    tokens += [*asked, *material.suffix, *led]
    wanted = [(begin, end, depth) for begin, end, one, depth in spans if one.asked]
    return Prompt(
        task=task,
        length=length,
        tokens=tuple(tokens),
        answer=tuple(answered),
        expected=tuple(expected),
        needles=tuple((begin, end) for begin, end, _ in wanted),
        distractors=tuple((begin, end) for begin, end, one, _ in spans if not one.asked),
        question=(start, len(tokens)),
        depth=wanted[0][2] if wanted else None,
        any_of=any_of,
    )


def separated(text: str, phrases: Phrases) -> str:
    """An insert with the space that the language puts between sentences."""
    return text if phrases.code in ("zh", "ja") else " " + text


def spaced(lead: str, material: Material) -> str:
    """A lead stands on a line of its own, or at the very beginning of the assistant's turn."""
    return lead if material.suffix else "\n" + lead
