"""Groups made of rollouts: their exact tokens, not text that would be tokenized again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from koine.align.prompts import Prompt
from koine.align.rollouts import Rollout
from koine.data.batch import Span
from koine.data.group_tokens import EncodedGroup
from koine.data.groups import Group, GroupBatch, Segment
from koine.data.packing import DocumentSlice
from koine.data.preference_order import build_groups

OnlineKind = Literal["scored", "preferences"]
SOURCE = "prompts"
"""Name of the mixture's source."""


@dataclass(frozen=True)
class RolloutGroup:
    """A group in memory, and the log-probability of each completion when it was drawn."""

    encoded: EncodedGroup
    group: Group
    behaviour: tuple[float, ...]


class _Groups:
    """Groups in memory, as `build_groups` reads them."""

    def __init__(self, groups: Sequence[RolloutGroup]) -> None:
        self._groups = groups

    def segments(self, document: int) -> list[Segment]:
        return self._groups[document].encoded.segments

    def tokens(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        return np.array(self._groups[document].encoded.tokens[start:end], dtype=np.int64)

    def mask(self, document: int, start: int = 0, end: int | None = None) -> NDArray[Any]:
        return np.array(self._groups[document].encoded.mask[start:end], dtype=np.uint8)

    def group(self, document: int, source: str) -> Group:
        return self._groups[document].group


def rollout_groups(
    prompts: Sequence[Prompt],
    found: Sequence[Rollout],
    *,
    kind: OnlineKind,
    first: int = 0,
    behaviour: Sequence[float] | None = None,
) -> list[RolloutGroup]:
    """Return a group for each prompt that has two or more scored completions, in order.

    `scored`: all of them. `preferences`: the best and the worst one, the first of equal ones; with equal scores
    neither is better, and `probability` is 0.5.

    Args:
        prompts: consecutive prompts of a step.
        found: their completions; those without a score are left out.
        kind: of the groups.
        first: number of the first prompt in the step.
        behaviour: log-probability of each completion when it was drawn; None: as the engine recorded it.
    """
    if behaviour is None:
        behaviour = [sum(one.log_probabilities) for one in found]
    drawn_with = {(one.prompt, one.sample): value for one, value in zip(found, behaviour, strict=True)}
    by_prompt: dict[int, list[Rollout]] = {}
    for one in found:
        by_prompt.setdefault(one.prompt, []).append(one)
    groups = []
    for number, prompt in enumerate(prompts, start=first):
        drawn = by_prompt.get(number, [])
        scored = [one for one in drawn if one.score is not None]
        if len(scored) < 2:
            continue
        scores = [float(one.score) for one in scored if one.score is not None]
        group = Group(prompt.id, prompt.language, SOURCE, number, kind, failed=len(drawn) - len(scored))
        if kind == "preferences":
            best, worst = _extremes(scores)
            group = replace(
                group,
                probability=0.5 if scores[best] == scores[worst] else 1.0,
                margin=scores[best] - scores[worst],
            )
            scored = [scored[best], scored[worst]]
        else:
            group = replace(group, scores=tuple(scores))
        encoded = EncodedGroup(probability=group.probability, margin=group.margin, scores=list(group.scores))
        root = encoded.add(-1, prompt.tokens, None)
        for one in scored:
            encoded.add(root, one.tokens, [True] * len(one.tokens))
        groups.append(
            RolloutGroup(encoded, group, tuple(drawn_with[one.prompt, one.sample] for one in scored))
        )
    return groups


def _extremes(scores: Sequence[float]) -> tuple[int, int]:
    """Return where the best and the worst score are; never the same place."""
    best = scores.index(max(scores))
    worst = min((place for place in range(len(scores)) if place != best), key=lambda place: scores[place])
    return best, worst


def group_batch(rows: Sequence[Sequence[RolloutGroup]]) -> GroupBatch:
    """Return a batch of rows of groups, as wide as its longest row, with the log-probabilities when drawn."""
    flat = [group for row in rows for group in row]
    source = _Groups(flat)
    content, number = [], 0
    for row in rows:
        pieces = []
        for one in row:
            pieces.append((source, SOURCE, DocumentSlice(number, 0, len(one.encoded.tokens))))
            number += 1
        content.append(pieces)
    time = max((sum(piece.end for _, _, piece in pieces) for pieces in content), default=0)
    batch = build_groups(content, max(1, time), lambda: [_spans(row) for row in rows])
    behaviour = torch.tensor([value for one in flat for value in one.behaviour], dtype=torch.float32)
    return replace(batch, behaviour=behaviour)


def _spans(row: Sequence[RolloutGroup]) -> list[Span]:
    spans, column = [], 0
    for one in row:
        length = len(one.encoded.tokens)
        spans.append(
            Span(
                SOURCE, one.group.language, "", one.group.record_id, 0, one.group.document, 0, length, column
            )
        )
        column += length
    return spans
