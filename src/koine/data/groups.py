"""Groups: the completions of one prompt in one row, which share the prompt's tokens.

A group is stored as one document: a tree of segments, one after another. The root is the prompt. Its children
are the completions. A completion can have children too: the turn that asks for a revision, and after it the
revised completions (SRPO). A token attends to its own segment and to the segments on the path to the root;
its position goes on along this path.

Shapes: b rows, t columns, n completion tokens, C completions, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from koine.data.batch import Span

GroupKind = Literal["preferences", "labelled", "scored"]
TokenKind = Literal["documents", "preferences", "labelled", "scored"]
"""What a folder of token shards holds: documents (texts or chats), or groups of one kind."""


class Segment(NamedTuple):
    """One node of a group's tree.

    parent: index in the group of the segment that it continues; -1 for the root.
    length: tokens.
    completion: whether its tokens have log-probabilities that count.
    """

    parent: int
    length: int
    completion: bool


@dataclass(frozen=True)
class Group:
    """Description of a group.

    Attributes:
        record_id: id of its record.
        language: code of its record.
        source: name of the mixture's source.
        document: number in the source.
        kind: which of the values below it has.
        probability: of preferences, that the first completion is the better one; 0.5 is a tie.
        margin: of preferences, by how much; 0 where the record has none.
        labels: of labelled completions, whether each is good.
        scores: of scored completions, the score of each.
        failed: completions of the prompt that could not be scored, and are not in the group.
    """

    record_id: str
    language: str
    source: str
    document: int
    kind: GroupKind
    probability: float = 1.0
    margin: float = 0.0
    labels: tuple[bool, ...] = ()
    scores: tuple[float, ...] = ()
    failed: int = 0


class GroupSource(Protocol):
    """Where groups are read from: `koine.data.shards.TokenSource` is one."""

    def segments(self, document: int, /) -> list[Segment]:
        """Return the tree of a group."""
        ...

    def tokens(self, document: int, start: int = 0, end: int | None = None, /) -> NDArray[Any]:
        """Return ids `[start, end)` of a group."""
        ...

    def mask(self, document: int, start: int = 0, end: int | None = None, /) -> NDArray[Any]:
        """Return 1 for the tokens `[start, end)` that count."""
        ...

    def group(self, document: int, source: str, /) -> Group:
        """Return the description of a group; `source` is the name of the mixture's source."""
        ...


class PlacedSegment(NamedTuple):
    """A segment in a batch: columns `[start, start + length)` of a row.

    parent: index of another placed segment, or -1. completion: index of the completion, or -1.
    group: index of the group. position: of its first token in the conversation.
    """

    row: int
    start: int
    length: int
    parent: int
    completion: int
    group: int
    position: int


@dataclass(frozen=True)
class GroupBatch:
    """Rows of whole groups.

    Attributes:
        tokens: `[b, t]` int64 ids, 0 for padding.
        document_ids: `[b, t]` int32, number of the group in the row, -1 for padding.
        positions: `[b, t]` int64, position of a token in its conversation.
        segments: all segments, in the order of rows and columns.
        predicting: `[n]` int64, `row * t + column` of the hidden state that predicts a completion token.
        predicted: `[n]` int64, the completion tokens that count.
        predicted_at: `[n]` int64, `row * t + column` of these tokens.
        completion_of: `[n]` int64, index of their completion.
        group_of: `[C]` int64, group of each completion. Those of a group are adjacent, in the record's order.
        groups: descriptions, in the order of rows and columns.
        mismatched: returns the batch of the same prompts with completions of other records
            (`koine.data.mismatched`), one group a row; None but for labelled groups.
        behaviour: `[C]` float32, log-probabilities of completions by the policy that drew them; None where it is
            not known.
        on_policy: whether this policy had the weights of the moment, so that `behaviour` differs from the
            trainer's log-probabilities by rounding only.
    """

    tokens: Tensor
    document_ids: Tensor
    positions: Tensor
    segments: tuple[PlacedSegment, ...]
    predicting: Tensor
    predicted: Tensor
    predicted_at: Tensor
    completion_of: Tensor
    group_of: Tensor
    groups: tuple[Group, ...]
    _spans: Callable[[], list[list[Span]]]
    mismatched: Callable[[], GroupBatch] | None = None
    behaviour: Tensor | None = None
    on_policy: bool = False

    @property
    def documents(self) -> list[list[Span]]:
        """The groups in each row, looked up on demand."""
        return self._spans()

    @property
    def completions(self) -> int:
        """Number of completions."""
        return len(self.group_of)

    @property
    def completion_lengths(self) -> Tensor:
        """Tokens of each completion that count, `[C]` int64."""
        return torch.bincount(self.completion_of, minlength=self.completions)

    def to(self, device: torch.device | str) -> GroupBatch:
        """Return the batch with its tensors on `device`."""
        names = ["tokens", "document_ids", "positions", "predicting", "predicted", "predicted_at"]
        names += ["completion_of", "group_of"]
        names += [] if self.behaviour is None else ["behaviour"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def without_padding(self) -> GroupBatch:
        """Return the same groups one after another in one row; itself where no row has padding."""
        is_real = (self.document_ids >= 0).flatten()
        if bool(is_real.all()):
            return self
        column_of = is_real.cumsum(0) - 1
        time = self.tokens.shape[1]
        starts = column_of[[one.row * time + one.start for one in self.segments]].tolist()
        groups = torch.tensor([one.group for one in self.segments], dtype=torch.int32)
        lengths = torch.tensor([one.length for one in self.segments])
        return replace(
            self,
            tokens=self.tokens.flatten()[is_real][None],
            document_ids=groups.repeat_interleave(lengths)[None].to(self.tokens.device),
            positions=self.positions.flatten()[is_real][None],
            segments=tuple(
                one._replace(row=0, start=start) for one, start in zip(self.segments, starts, strict=True)
            ),
            predicting=column_of[self.predicting],
            predicted_at=column_of[self.predicted_at],
        )

    def separate(self) -> GroupBatch:
        """Return the same completions in rows of their own: prompt and completion, padded on the right.

        For models that cannot share a prompt. A row has the tokens on the path from the root to a completion.
        """
        paths = [
            path_of(self.segments, number)
            for number, segment in enumerate(self.segments)
            if segment.completion >= 0
        ]
        lengths = [sum(self.segments[number].length for number in path) for path in paths]
        rows = [
            torch.cat(
                [
                    self.tokens[one.row, one.start : one.start + one.length]
                    for one in (self.segments[number] for number in path)
                ]
            )
            for path in paths
        ]
        time = max(lengths, default=0)
        tokens = self.tokens.new_zeros(len(rows), time)
        ids = self.document_ids.new_full((len(rows), time), -1)
        for row, (content, length) in enumerate(zip(rows, lengths, strict=True)):
            tokens[row, :length], ids[row, :length] = content, 0
        placed: list[PlacedSegment] = []
        offsets = torch.zeros(self.completions, dtype=torch.int64, device=self.tokens.device)
        for row, path in enumerate(paths):
            start, parent = 0, -1
            for number in path:
                one = self.segments[number]
                own = one.completion if number == path[-1] else -1
                placed.append(PlacedSegment(row, start, one.length, parent, own, one.group, start))
                parent, start = len(placed) - 1, start + one.length
            leaf = self.segments[path[-1]]
            # Where the first token of the completion was, and where it is now.
            was = leaf.row * self.tokens.shape[1] + leaf.start
            offsets[leaf.completion] = row * time + (start - leaf.length) - was
        predicted_at = self.predicted_at + offsets[self.completion_of]
        positions = torch.arange(time, device=tokens.device).expand(len(rows), time)
        return replace(
            self,
            tokens=tokens,
            document_ids=ids,
            positions=positions,
            segments=tuple(placed),
            predicting=predicted_at - 1,
            predicted_at=predicted_at,
        )


def path_of(segments: Sequence[PlacedSegment], number: int) -> list[int]:
    """Return the segments from the root to segment `number`, both included."""
    path = [number]
    while segments[path[-1]].parent >= 0:
        path.append(segments[path[-1]].parent)
    return path[::-1]


def fewest_tokens(segments: Sequence[Segment]) -> int:
    """Return the tokens that a group takes at least: with its completions cut to one token each.

    A group whose completions are shown again, and then revised, is never cut: the model would learn to go on
    after half an answer.
    """
    shown = any(one.parent >= 0 and segments[one.parent].completion for one in segments)
    return sum(1 if one.completion and not shown else one.length for one in segments)


def fit_segments(segments: Sequence[Segment], room: int) -> list[int]:
    """Return the length of each segment in a row of `room` tokens: the longest completions are cut first.

    All completions are cut to one common length at most, so that none of a group loses its end where others
    keep theirs at that length. Raises `ValueError` where `fewest_tokens` do not fit.
    """
    if fewest_tokens(segments) > room:
        raise ValueError("the group does not fit, even cut as far as it may be")
    fixed = sum(one.length for one in segments if not one.completion)
    completions = sorted(one.length for one in segments if one.completion)
    left, cap = room - fixed, max(completions, default=0)
    for index, length in enumerate(completions):
        share = left // (len(completions) - index)
        if length > share:
            cap = share
            break
        left -= length
    return [min(one.length, cap) if one.completion else one.length for one in segments]
