"""How the documents of one language become rows: joined and cut, whole, or alone. Row `n` follows from `n` alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEPT_EPOCHS = 2


class Pieces(NamedTuple):
    """Tokens `[start, end)` of a document, in a row."""

    document: int
    start: int
    end: int


class _Epochs:
    """Shuffled documents, epoch by epoch; each epoch's shuffle depends on (seed, epoch) alone."""

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        self._documents = documents
        self._lengths = lengths[documents]
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


class StreamPacking(_Epochs):
    """All documents of an epoch joined, epoch after epoch, and cut every `time` tokens."""

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        super().__init__(documents, lengths, time, seed)
        self._total = int(self._lengths.sum())

    def rows_in_epoch(self) -> float:
        """Rows that one pass over the documents fills."""
        return self._total / self._time

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        if epoch in self._kept:
            value: tuple[NDArray[Any], NDArray[Any]] = self._kept[epoch]
            return value
        order = self._shuffle(epoch)
        ends = np.cumsum(self._lengths[order])
        kept: tuple[NDArray[Any], NDArray[Any]] = self._keep(epoch, (order, ends))
        return kept

    def row(self, number: int) -> list[Pieces]:
        """The pieces of row `number`; together they hold one token more than the row, the last position's target."""
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
                    pieces.append(Pieces(int(self._documents[which]), start, end))
                wanted -= end - start
                position += end - start
                index += 1
            epoch, position = epoch + 1, 0
        return pieces


class WholePacking(_Epochs):
    """Rows of whole documents in shuffled order, a new row where the next one does not fit; longer ones are cut off."""

    def __init__(
        self, documents: NDArray[Any], lengths: NDArray[np.int64], time: int, seed: tuple[int, ...]
    ) -> None:
        super().__init__(documents, lengths, time, seed)
        self._first_rows = [0]

    def cut_off(self) -> tuple[int, int]:
        """Documents that are longer than a row and lose their end, and all documents."""
        return int((self._lengths > self._time).sum()), len(self._lengths)

    def rows_in_epoch(self) -> float:
        """Rows of the first pass over the documents."""
        return float(len(self._epoch(0)[1]) - 1)

    def _epoch(self, epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The shuffled documents, and where in that order each row begins."""
        if epoch in self._kept:
            value: tuple[NDArray[Any], NDArray[Any]] = self._kept[epoch]
            return value
        order = self._shuffle(epoch)
        kept: tuple[NDArray[Any], NDArray[Any]] = self._keep(epoch, (order, self._begins(order)))
        return kept

    def _begins(self, order: NDArray[Any]) -> NDArray[Any]:
        ends = np.cumsum(np.minimum(self._lengths[order], self._time))
        begins, filled = [0], 0
        while begins[-1] < len(order):
            begins.append(int(np.searchsorted(ends, filled + self._time, side="right")))
            filled = int(ends[begins[-1] - 1])
        return np.array(begins)

    def row(self, number: int) -> list[Pieces]:
        """The pieces of row `number`."""
        while self._first_rows[-1] <= number:
            epoch = len(self._first_rows) - 1
            self._first_rows.append(self._first_rows[-1] + len(self._epoch(epoch)[1]) - 1)
        epoch = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        order, begins = self._epoch(epoch)
        inside = number - self._first_rows[epoch]
        return [
            Pieces(int(self._documents[which]), 0, int(min(self._lengths[which], self._time)))
            for which in order[begins[inside] : begins[inside + 1]]
        ]


class AlonePacking(WholePacking):
    """A document a row, in shuffled order; what is longer than the row is cut off."""

    def _begins(self, order: NDArray[Any]) -> NDArray[Any]:
        return np.arange(len(order) + 1)
