"""Pack the documents of one language into rows: concatenated, not split, or one a row.

Row `n` depends on `n` only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEPT_EPOCHS = 2


class DocumentSlice(NamedTuple):
    """Tokens `[start, end)` of a document, in a row."""

    document: int
    start: int
    end: int


class _Epochs:
    """Shuffled documents, epoch by epoch; the shuffle of an epoch depends only on (seed, epoch)."""

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        self._documents = documents
        self._lengths: NDArray[np.int64] = lengths[documents]
        self._time = time
        self._seed = seed
        self._kept: dict[int, Any] = {}

    def _shuffle(self, epoch: int) -> NDArray[Any]:
        generator = np.random.Generator(np.random.Philox([*self._seed, epoch]))
        return generator.permutation(len(self._documents))

    def _keep(self, epoch: int, value: Any) -> Any:
        if len(self._kept) >= KEPT_EPOCHS:
            self._kept.pop(next(iter(self._kept)))
        self._kept[epoch] = value
        return value

    @property
    def shuffle(self) -> tuple[int, ...]:
        """Seed of the documents' order."""
        return self._seed


class ConcatPacking(_Epochs):
    """All documents of an epoch concatenated, epoch after epoch, and cut every `time` tokens."""

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        super().__init__(documents, lengths, time, seed)
        self._total = int(self._lengths.sum())

    def rows_in_epoch(self) -> float:
        """Return the rows that one epoch fills."""
        return self._total / self._time

    def documents_before(self, row: int) -> int:
        """Count the documents that begin in rows before `row`, over all epochs."""
        epoch, position = divmod(row * self._time, self._total)
        _, ends = self._epoch(epoch)
        begun = int(np.searchsorted(ends, position, side="left")) + 1 if position else 0
        return epoch * len(self._lengths) + begun

    def first_row_after(self, documents: int) -> int:
        """Return the first row without any of the first `documents`, counted as by `documents_before`."""
        epoch, index = divmod(documents, len(self._lengths))
        _, ends = self._epoch(epoch)
        tokens = epoch * self._total + (int(ends[index - 1]) if index else 0)
        return -(-tokens // self._time)

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the shuffled documents, and where each ends in the concatenated epoch."""
        if epoch in self._kept:
            value: tuple[NDArray[Any], NDArray[Any]] = self._kept[epoch]
            return value
        order = self._shuffle(epoch)
        ends = np.cumsum(self._lengths[order])
        kept: tuple[NDArray[Any], NDArray[Any]] = self._keep(epoch, (order, ends))
        return kept

    def row(self, number: int) -> list[DocumentSlice]:
        """Return the slices of row `number`; they hold one token more than the row, its last target."""
        epoch, position = divmod(number * self._time, self._total)
        wanted = self._time + 1
        pieces = []
        while wanted > 0:
            order, ends = self._epoch(epoch)
            index = int(np.searchsorted(ends, position, side="right"))
            while wanted > 0 and index < len(order):
                which = order[index]
                length = int(self._lengths[which])
                start = length - (int(ends[index]) - position)
                end = min(length, start + wanted)
                if end > start:
                    pieces.append(DocumentSlice(int(self._documents[which]), start, end))
                wanted -= end - start
                position += end - start
                index += 1
            epoch, position = epoch + 1, 0
        return pieces


class NoSplitPacking(_Epochs):
    """Rows of whole documents in shuffled order; one that does not fit begins a new row.

    Documents longer than a row are truncated.
    """

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        super().__init__(documents, lengths, time, seed)
        self._first_rows = [0]

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self._time

    @property
    def documents(self) -> NDArray[Any]:
        """The documents that rows are drawn from."""
        return self._documents

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each of `documents`."""
        return self._lengths

    def rows_in_epoch(self) -> float:
        """Return the rows of the first epoch."""
        return float(len(self._epoch(0)[1]) - 1)

    def documents_before(self, row: int) -> int:
        """Count the documents of the rows before `row`, over all epochs."""
        epoch, inside = self._locate(row)
        return epoch * len(self._lengths) + int(self._epoch(epoch)[1][inside])

    def first_row_after(self, documents: int) -> int:
        """Return the first row without any of the first `documents`, counted as by `documents_before`."""
        epoch, index = divmod(documents, len(self._lengths))
        while len(self._first_rows) <= epoch:
            self._add_epoch()
        begins = self._epoch(epoch)[1]
        return self._first_rows[epoch] + int(np.searchsorted(begins, index, side="left"))

    def _add_epoch(self) -> None:
        epoch = len(self._first_rows) - 1
        self._first_rows.append(self._first_rows[-1] + len(self._epoch(epoch)[1]) - 1)

    def _locate(self, row: int) -> tuple[int, int]:
        """Return the epoch of a row, and its number inside."""
        while self._first_rows[-1] <= row:
            self._add_epoch()
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return epoch, row - self._first_rows[epoch]

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the shuffled documents, and where in that order each row begins."""
        if epoch in self._kept:
            value: tuple[NDArray[Any], NDArray[Any]] = self._kept[epoch]
            return value
        order = self._shuffle(epoch)
        kept: tuple[NDArray[Any], NDArray[Any]] = self._keep(epoch, (order, self._begins(order)))
        return kept

    def _begins(self, order: NDArray[Any]) -> NDArray[Any]:
        """Return where in the shuffled order each row begins."""
        ends = np.cumsum(np.minimum(self._lengths[order], self._time))
        begins, filled = [0], 0
        while begins[-1] < len(order):
            begins.append(int(np.searchsorted(ends, filled + self._time, side="right")))
            filled = int(ends[begins[-1] - 1])
        return np.array(begins)

    def row(self, number: int) -> list[DocumentSlice]:
        """Return the slices of row `number`."""
        epoch, inside = self._locate(number)
        order, begins = self._epoch(epoch)
        return [
            DocumentSlice(int(self._documents[which]), 0, int(min(self._lengths[which], self._time)))
            for which in order[begins[inside] : begins[inside + 1]]
        ]


class OnePerRowPacking(NoSplitPacking):
    """One document a row, in shuffled order; documents longer than a row are truncated."""

    def _begins(self, order: NDArray[Any]) -> NDArray[Any]:
        return np.arange(len(order) + 1)
