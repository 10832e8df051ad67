"""Find what is wrong with groups without a model: repeats, contradictions, truncation, languages, lengths.

Groups are compared by 64-bit digests of their tokens, 24 bytes a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.data.groups import Segment, fewest_tokens
from koine.data.shards import TokenSource
from koine.language_id import UNDETERMINED, identify
from koine.tokenizer import Tokenizer

CERTAIN = 0.9
"""Probability from which an identified language counts."""
FEWEST_LETTERS = 20
"""Letters of a text from which its language is identified."""
Identify = Callable[[str], str | None]


@dataclass(frozen=True)
class GroupText:
    """A group as text.

    prompt: without what the chat template writes around it. answers: one a completion of the prompt.
    """

    prompt: str
    answers: tuple[str, ...]


class GroupTexts:
    """Decodes the groups of a source."""

    def __init__(self, source: TokenSource, tokenizer: Tokenizer) -> None:
        self._source, self._tokenizer = source, tokenizer
        # What stands before and after a single turn; earlier turns of a conversation stay in the text.
        frames = [
            tokenizer.encode_messages([{"role": "user", "content": text}], generation_prompt=True)[0]
            for text in ("1", "b")
        ]
        self._before, self._after = _common(*frames), _common(*(frame[::-1] for frame in frames))

    def __call__(self, document: int) -> GroupText:
        """Return a group as text."""
        source = self._source
        segments = source.segments(document)
        parts = split_tokens(source, document, segments)
        prompt = parts[0]
        before = _common(prompt.tolist(), self._before)
        after = _common(prompt[len(before) :][::-1].tolist(), self._after)
        inner = prompt[len(before) : len(prompt) - len(after)]
        return GroupText(
            self._tokenizer.decode(inner.tolist()).strip(),
            tuple(
                self._tokenizer.decode(part.tolist()).strip()
                for part, one in zip(parts, segments, strict=True)
                if one.completion and one.parent == 0
            ),
        )


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """Return the common beginning of two lists."""
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return list(one[:length])


def split_tokens(
    source: TokenSource, document: int, segments: Sequence[Segment]
) -> list[NDArray[np.integer[Any]]]:
    """Return the tokens of each segment of a group."""
    ends = np.cumsum([one.length for one in segments])[:-1]
    parts: list[NDArray[np.integer[Any]]] = np.split(source.tokens(document), ends)
    return parts


def certain_language(text: str) -> str | None:
    """Return the language of a text; None where it is short or the identification is not certain."""
    if sum(character.isalpha() for character in text) < FEWEST_LETTERS:
        return None
    found = identify(text)
    return None if found.code == UNDETERMINED or found.probability < CERTAIN else found.code


@dataclass(frozen=True)
class GroupDigests:
    """Digests of the groups of a source, each `[groups]` uint64.

    prompts: of the prompt. whole: of prompt, answers and label. opposed: of the group that contradicts it:
    the answers of a pair swapped, or the other label; empty for scored completions.
    """

    prompts: NDArray[np.uint64]
    whole: NDArray[np.uint64]
    opposed: NDArray[np.uint64]

    def repeats(self) -> NDArray[np.bool_]:
        """Return whether an earlier group is the same."""
        found = np.ones(len(self.whole), dtype=np.bool_)
        found[np.unique(self.whole, return_index=True)[1]] = False
        return found

    def contradictions(self) -> NDArray[np.bool_]:
        """Return whether another group says the opposite."""
        if not len(self.opposed):
            return np.zeros(len(self.whole), dtype=np.bool_)
        return np.isin(self.opposed, self.whole)

    def shared_prompts(self, other: GroupDigests) -> NDArray[np.bool_]:
        """Return whether the prompt of each group is also in another source."""
        return np.isin(self.prompts, other.prompts)


def digest_groups(source: TokenSource) -> GroupDigests:
    """Return the digests of all groups."""
    prompts = np.zeros(len(source), dtype=np.uint64)
    whole, opposed = np.zeros_like(prompts), np.zeros_like(prompts)
    for number in range(len(source)):
        segments = source.segments(number)
        parts = [part.tobytes() for part in split_tokens(source, number, segments)]
        # Revisions repeat what the group says.
        answers = [
            part for part, one in zip(parts, segments, strict=True) if one.completion and one.parent == 0
        ]
        label, other = b"", b""
        if source.kind == "labelled":
            good = source.group(number, "").labels[0]
            label, other = (b"+", b"-") if good else (b"-", b"+")
        elif source.kind == "preferences":
            probability = source.group(number, "").probability
            # Which answer is better; of a tie neither.
            if probability < 0.5:
                answers.reverse()
        prompts[number] = _digest(parts[0])
        whole[number] = _digest(label, parts[0], *answers)
        opposed[number] = _digest(other, parts[0], *(answers if label else answers[::-1]))
    return GroupDigests(prompts, whole, opposed if source.kind != "scored" else opposed[:0])


def _digest(*parts: bytes) -> int:
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Truncation:
    """What a row of some length does to each group, `[groups]` each.

    cut: completions are cut. left_out: the prompt leaves no room, so the group is not trained on.
    """

    cut: NDArray[np.bool_]
    left_out: NDArray[np.bool_]


def truncation(source: TokenSource, row: int) -> Truncation:
    """Return which groups are cut or left out in rows of `row` tokens."""
    least = np.array([fewest_tokens(source.segments(number)) for number in range(len(source))])
    left_out = least > row
    return Truncation((source.lengths > row) & ~left_out, left_out)


def longer_wins(source: TokenSource, document: int) -> tuple[float, int]:
    """Return how often the longer answer is the better one, and of how many pairs of answers.

    Answers of one length count half; a soft label counts by its probability. Scored completions are compared
    two by two where their scores differ. Lengths are tokens that count.
    """
    segments = source.segments(document)
    mask = np.split(source.mask(document), np.cumsum([one.length for one in segments])[:-1])
    lengths = [
        int(part.sum())
        for part, one in zip(mask, segments, strict=True)
        if one.completion and one.parent == 0
    ]
    group = source.group(document, "")
    if group.kind == "preferences":
        return agreement(lengths[0] - lengths[1], group.probability), 1
    pairs = [
        agreement(lengths[one] - lengths[other], 1.0)
        for one in range(len(group.scores))
        for other in range(len(group.scores))
        if group.scores[one] > group.scores[other]
    ]
    return sum(pairs), len(pairs)


def agreement(difference: float, probability: float) -> float:
    """Return the probability of the label that the sign of a difference agrees with; 0.5 where it is 0."""
    return (1 + float(np.sign(difference)) * (2 * probability - 1)) / 2


def other_languages(text: GroupText, language_of: Identify = certain_language) -> tuple[int, int]:
    """Return how many answers are in another language than the prompt, and how many were compared."""
    prompt = language_of(text.prompt)
    if prompt is None:
        return 0, 0
    found = [code for code in map(language_of, text.answers) if code is not None]
    return sum(code != prompt for code in found), len(found)
