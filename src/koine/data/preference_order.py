"""Batches of groups, by step: the data order of preference training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from koine.data.collate import spans_of
from koine.data.data_order import RowOrder
from koine.data.groups import Group, GroupBatch, GroupSource, PlacedSegment, fit_segments
from koine.data.mismatched import MismatchedSource
from koine.data.mixture import Mixture
from koine.data.packing import DocumentSlice
from koine.errors import UserError


class PreferenceOrder(RowOrder):
    """Batches of a mixture of groups: a row holds whole groups, and `batch` is a pure function of the step.

    Completions of a group that is longer than a row are cut to one common length. Groups whose prompt leaves
    no room for them, and longer ones with revisions, are left out, with a warning.

    Raises `UserError` for a packing that cuts documents, for sources that hold no groups, and where most
    groups would be left out.
    """

    holds_groups = True

    def __init__(self, mixture: Mixture, *, verify: bool = True) -> None:
        if mixture.packing == "concat":
            raise UserError(
                "groups cannot be packed by concat, which cuts them anywhere",
                hint="choose --packing no_split or one_per_row",
            )
        super().__init__(mixture, verify=verify)
        turns = {source.manifest.get("revision") for source in self.sources.values()} - {None}
        if len(turns) > 1:
            raise UserError(
                f"the sources ask for a revision in {len(turns)} different ways",
                hint="tokenize all with the same --revision, which a model is asked with later",
            )
        self._mismatched: dict[Path, MismatchedSource] = {}

    def record(self) -> dict[str, Any]:
        """Return what the trained model's folder keeps of the groups: the turn that asks for a revision."""
        turns = {source.manifest.get("revision") for source in self.sources.values()} - {None}
        return {"revision": turns.pop()} if turns else {}

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> GroupBatch:
        """Return the groups in the rows of `rank` at `step`; `micro_batch` takes a slice of the rows."""
        content, time = self.rows_of(step, rank=rank, world_size=world_size, micro_batch=micro_batch)
        rows = [[(one.tokens, one.source.name, piece) for piece in pieces] for one, pieces in content]

        def mismatched() -> GroupBatch:
            found = [
                (self.mismatched(one.tokens.path), one.source.name, piece)
                for one, pieces in content
                for piece in pieces
            ]
            longest = max(int(source.lengths[piece.document]) for source, _, piece in found)
            return build_groups([[group] for group in found], min(time, longest), list)

        batch = build_groups(rows, time, lambda: spans_of(content, time))
        labelled = any(group.kind == "labelled" for group in batch.groups)
        return replace(batch, mismatched=mismatched) if labelled else batch

    def mismatched(self, path: Path) -> MismatchedSource:
        """Return the groups of a source of labelled completions with completions exchanged."""
        if path not in self._mismatched:
            self._mismatched[path] = MismatchedSource(self.sources[path])
        return self._mismatched[path]


def build_groups(
    rows: Sequence[Sequence[tuple[GroupSource, str, DocumentSlice]]], time: int, spans: Any
) -> GroupBatch:
    """Build a batch of groups.

    Args:
        rows: the groups of each row: where to read it, the name of its source, and the document.
        time: tokens of a row.
        spans: returns the documents of each row (`GroupBatch.documents`).
    """
    tokens = np.zeros((len(rows), time), dtype=np.int64)
    ids = np.full((len(rows), time), -1, dtype=np.int32)
    positions = np.zeros((len(rows), time), dtype=np.int64)
    segments: list[PlacedSegment] = []
    groups: list[Group] = []
    group_of: list[int] = []
    found: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
    for row, pieces in enumerate(rows):
        column = 0
        for source, name, piece in pieces:
            tree = source.segments(piece.document)
            starts = np.cumsum([0, *(one.length for one in tree)])
            first = len(segments)
            number = int(ids[row, column - 1]) + 1 if column else 0
            for index, (one, length) in enumerate(zip(tree, fit_segments(tree, time - column), strict=True)):
                begin = int(starts[index])
                parent = segments[first + one.parent] if one.parent >= 0 else None
                position = 0 if parent is None else parent.position + parent.length
                end = column + length
                tokens[row, column:end] = source.tokens(piece.document, begin, begin + length)
                ids[row, column:end] = number
                positions[row, column:end] = np.arange(position, position + length)
                completion = -1
                if one.completion:
                    assert parent is not None
                    completion = len(group_of)
                    group_of.append(len(groups))
                    counted = np.flatnonzero(source.mask(piece.document, begin, begin + length))
                    before = np.where(counted > 0, column + counted - 1, parent.start + parent.length - 1)
                    base = row * time
                    found.append((base + before, tokens[row, column + counted], base + column + counted))
                placed_parent = first + one.parent if one.parent >= 0 else -1
                segments.append(
                    PlacedSegment(row, column, length, placed_parent, completion, len(groups), position)
                )
                column = end
            groups.append(source.group(piece.document, name))
    empty = np.zeros(0, dtype=np.int64)
    predicting, predicted, at = (np.concatenate([empty, *(one[part] for one in found)]) for part in range(3))
    of = np.repeat(np.arange(len(found)), [len(before) for before, _, _ in found])
    return GroupBatch(
        tokens=torch.from_numpy(tokens),
        document_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(positions),
        segments=tuple(segments),
        predicting=torch.from_numpy(predicting),
        predicted=torch.from_numpy(predicted),
        predicted_at=torch.from_numpy(at),
        completion_of=torch.from_numpy(of),
        group_of=torch.tensor(group_of, dtype=torch.int64),
        groups=tuple(groups),
        _spans=spans,
    )
