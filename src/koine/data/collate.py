"""Build the rows of a batch: tokens, targets and document ids from slices of documents."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from koine.data.batch import NO_TARGET, Span
from koine.data.components import Component
from koine.data.packing import DocumentSlice


def fill(
    component: Component,
    pieces: list[DocumentSlice],
    tokens: NDArray[Any],
    targets: NDArray[Any],
    ids: NDArray[Any],
    *,
    cross: bool,
) -> None:
    """Write one row in place: `tokens`, `targets` and `ids`, each `[time]`.

    The last token of a row has its target one token further in the same slice. With `cross`, the last token
    of a slice has the first token of the next slice as target.
    """
    time = len(tokens)
    column = 0
    for number, (document, start, end) in enumerate(pieces):
        # A slice may hold one token beyond the row: the target of the last position.
        slice_tokens = component.tokens.tokens(document, start, end)
        width = min(end - start, time - column)
        if width <= 0:
            if cross and column == time:
                targets[-1] = slice_tokens[0] if _counts_as_target(component, document, start) else NO_TARGET
            break
        tokens[column : column + width] = slice_tokens[:width]
        ids[column : column + width] = number
        follow = slice_tokens[1 : width + 1].astype(np.int64)
        if component.tokens.chat:
            mask = component.tokens.mask(document, start, end)[1 : width + 1]
            follow = np.where(mask > 0, follow, NO_TARGET)
        targets[column : column + len(follow)] = follow
        if cross and column > 0 and _counts_as_target(component, document, start):
            targets[column - 1] = slice_tokens[0]
        column += width


def _counts_as_target(component: Component, document: int, position: int) -> bool:
    """Return whether a token is trained on: any token of a text, completions of a chat."""
    if not component.tokens.chat:
        return True
    return bool(component.tokens.mask(document, position, position + 1)[0])


def spans_of(content: list[tuple[Component, list[DocumentSlice]]], time: int) -> list[list[Span]]:
    """Return the spans of each row, without the one token beyond it."""
    rows = []
    for component, pieces in content:
        row, column = [], 0
        for document, start, end in pieces:
            end = min(end, start + time - column)
            if end <= start:
                break
            info = component.tokens.info(document)
            shard, index = component.tokens.locate(document)
            row.append(
                Span(
                    component.source.name,
                    info.language,
                    info.domain,
                    info.record_id,
                    shard,
                    index,
                    start,
                    end,
                    column,
                )
            )
            column += end - start
        rows.append(row)
    return rows
