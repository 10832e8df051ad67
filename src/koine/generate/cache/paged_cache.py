"""Keys and values of many sequences at once, each of its own length: pages for full layers, rings for windowed ones.

A full layer's keys lie in pages of `page` positions, and pages in slabs that are made when they are needed and given back when they
are empty, so that memory follows use. A page may belong to several sequences that begin alike. A windowed layer's keys lie in one
ring of `window` positions a sequence: a new position takes the place of the one that has left the window. Keys are stored rotated, so
their order inside a ring does not matter.

One step of decoding attends for all sequences together: the scores of a slab's pages are one matmul, read where they lie, whoever
owns each page, and the pages of a sequence meet in a softmax over their maxima and sums.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from koine.model.config import ModelConfig
from koine.model.decoder import Decoder

PAGE = 128
"""Positions a page."""

SLAB = 32
"""Pages of the first slab."""

DOUBLING = 256
"""Up to so many pages each slab is as large as all before it, so that there are few to go through; later ones are a quarter of that."""

SPARSE = 0.5
"""Below this share of wanted pages between the first and the last wanted one of a slab, they are gathered and not read in place."""


def slab_pages(pages: int) -> int:
    """Pages of the next slab, after so many."""
    return max(SLAB, pages if pages < DOUBLING else pages // 4)


@dataclass(eq=False)
class CachedSequence:
    """One sequence in the cache: how many positions were read, its pages in order, and its row in the rings."""

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prefix:
    """What of a sequence can be read on from: its length, its pages (held), and its windows as they were."""

    length: int
    pages: tuple[int, ...]
    rings: tuple[Tensor, ...]

    def bytes(self) -> int:
        """Bytes of the windows (pages are counted by the cache)."""
        return sum(ring.nbytes for ring in self.rings)


class OutOfPages(Exception):  # noqa: N818
    """The cache may not grow any more: something must be given back first."""


class PagedCache:
    """Keys and values of the sequences that were added, in the dtype and on the device given.

    max_pages: pages that may be in use at once; `OutOfPages` is raised where more are needed.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        *,
        page: int = PAGE,
        max_pages: int | None = None,
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.page, self.max_pages = page, max_pages
        self.full = [index for index, spec in enumerate(config.layers) if spec.window is None]
        self.windowed = {
            index: spec.window for index, spec in enumerate(config.layers) if spec.window is not None
        }
        self._slabs: dict[int, list[Tensor]] = {index: [] for index in self.full}
        self._rings = {index: self._new_ring(window, 0) for index, window in self.windowed.items()}
        self._starts: list[int] = []
        self._pages = 0
        self._free: list[int] = []
        self._ref_counts: dict[int, int] = {}
        self.sequences: list[CachedSequence] = []
        self.changes = 0
        """Counts what makes a plan of reading out of date: sequences and pages that come and go."""

    @classmethod
    def of_model(cls, model: Decoder, *, page: int = PAGE, max_pages: int | None = None) -> PagedCache:
        """Return an empty cache in the dtype and on the device of the model's weights."""
        weight = model.embedding.weight
        return cls(model.config, weight.dtype, weight.device, page=page, max_pages=max_pages)

    def _new_ring(self, window: int, slots: int) -> Tensor:
        return self._empty((2, slots, self.config.kv_heads, window, self.config.head_dim))

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        # A tensor made in inference mode could not be written to outside of it, where sequences come and go.
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

    # -- sequences -----------------------------------------------------------------------------------------------------

    def add(self, prefix: Prefix | None = None) -> CachedSequence:
        """A new sequence, empty or going on from a prefix; its slot is the last."""
        slot = len(self.sequences)
        for index, ring in self._rings.items():
            if slot == ring.shape[1]:
                grown = self._new_ring(self.windowed[index], slot + max(1, slot // 4))
                grown[:, :slot] = ring
                self._rings[index] = grown
        sequence = CachedSequence(slot)
        if prefix is not None:
            whole = prefix.length // self.page
            partial: int | None = None
            if whole < len(prefix.pages):
                # The last page is not full, and its first owner may be writing to the rest of it: this sequence has a copy.
                [partial] = self._allocate(1)
                (source, at), (target, to) = self.locate(prefix.pages[whole]), self.locate(partial)
                for slabs in self._slabs.values():
                    slabs[target][:, :, to] = slabs[source][:, :, at]
            for number in prefix.pages[:whole]:
                self._ref_counts[number] += 1
            sequence.pages = [*prefix.pages[:whole], *([] if partial is None else [partial])]
            sequence.length = prefix.length
            for ring, held in zip(self._rings.values(), prefix.rings, strict=True):
                ring[:, slot, :, : held.shape[2]] = held
        self.sequences.append(sequence)
        self.changes += 1
        return sequence

    def remove(self, sequence: CachedSequence) -> None:
        """Forget a sequence; the last slot's ring moves into its place, so that slots stay dense."""
        last = self.sequences.pop()
        if last is not sequence:
            for ring in self._rings.values():
                ring[:, sequence.slot] = ring[:, last.slot]
            last.slot = sequence.slot
            self.sequences[last.slot] = last
        self._release_pages(sequence.pages)
        sequence.pages = []
        self.changes += 1

    def arrange(self, sequences: Sequence[CachedSequence]) -> None:
        """Give these sequences the slots 0, 1, ...; whoever has one of them moves."""
        for slot, sequence in enumerate(sequences):
            other = self.sequences[slot]
            if other is sequence:
                continue
            for ring in self._rings.values():
                ring[:, [slot, sequence.slot]] = ring[:, [sequence.slot, slot]]
            self.sequences[slot], self.sequences[sequence.slot] = sequence, other
            sequence.slot, other.slot = slot, sequence.slot
            self.changes += 1

    def prefix(self, sequence: CachedSequence) -> Prefix:
        """A sequence as it is now, to begin others with; hold it with care: it keeps pages until `release`."""
        for number in sequence.pages:
            self._ref_counts[number] += 1
        rings = []
        for index, ring in self._rings.items():
            held = min(sequence.length, self.windowed[index])
            rings.append(ring[:, sequence.slot, :, :held].clone())
        return Prefix(sequence.length, tuple(sequence.pages), tuple(rings))

    def release(self, prefix: Prefix) -> None:
        """Give up a prefix's hold on its pages."""
        self._release_pages(prefix.pages)

    # -- pages ---------------------------------------------------------------------------------------------------------

    def pages_for(self, positions: int) -> int:
        """Pages that a sequence of so many positions needs."""
        return -(-positions // self.page) if self.full else 0

    @property
    def pages_in_use(self) -> int:
        """Pages that some sequence or prefix holds."""
        return len(self._ref_counts)

    @property
    def slabs(self) -> int:
        """Slabs that are allocated."""
        return len(self._starts)

    def pages_left(self) -> float:
        """Pages that may still be taken."""
        return float("inf") if self.max_pages is None else self.max_pages - len(self._ref_counts)

    def reserve(self, sequence: CachedSequence, positions: int) -> None:
        """Pages for `positions` more; raises `OutOfPages` and takes none where they are not to be had."""
        if not self.full:
            return
        missing = self.pages_for(sequence.length + positions) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._allocate(missing)
            self.changes += 1

    def _allocate(self, count: int) -> list[int]:
        if count > self.pages_left():
            raise OutOfPages
        while len(self._free) < count:
            size = slab_pages(self._pages)
            shape = (2, self.config.kv_heads, size, self.page, self.config.head_dim)
            for slabs in self._slabs.values():
                slabs.append(self._empty(shape))
            self._starts.append(self._pages)
            for number in range(self._pages, self._pages + size):
                heapq.heappush(self._free, number)
            self._pages += size
        # The lowest first: pages in use stay close together, and slabs at the end become empty.
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for number in taken:
            self._ref_counts[number] = 1
        return taken

    def _release_pages(self, pages: Sequence[int]) -> None:
        for number in pages:
            self._ref_counts[number] -= 1
            if not self._ref_counts[number]:
                del self._ref_counts[number]
                heapq.heappush(self._free, number)
        needed = 1 + self.locate(max(self._ref_counts))[0] if self._ref_counts else 0
        # One slab is kept in reserve, so that the end of a sequence and the beginning of the next do not make and drop it in turn.
        if len(self._starts) > needed + 1:
            self._pages = self._starts[needed + 1]
            del self._starts[needed + 1 :]
            for slabs in self._slabs.values():
                del slabs[needed + 1 :]
            self._free = [number for number in self._free if number < self._pages]
            heapq.heapify(self._free)

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def bytes_held(self) -> int:
        """Bytes of the keys and values in use, counted in the tensors themselves: pages that somebody holds (whole, a shared one once), and
        the filled places of each sequence's rings. Kept prefixes have copies of their rings beside the cache (`Prefix.bytes`)."""
        held = 0
        for number in self._ref_counts:
            slab, at = self.locate(number)
            held += sum(slabs[slab][:, :, at].nbytes for slabs in self._slabs.values())
        for ring in self._rings.values():
            held += sum(ring[:, one.slot, :, : one.length].nbytes for one in self.sequences)
        return held

    def bytes_reserved(self) -> int:
        """Bytes of the memory that holds them: slabs and rings with their places that are not used yet."""
        slabs = sum(slab.nbytes for slabs in self._slabs.values() for slab in slabs)
        return slabs + sum(ring.nbytes for ring in self._rings.values())

    # -- where things lie ----------------------------------------------------------------------------------------------

    def locate(self, page: int) -> tuple[int, int]:
        """The slab of a page, and its place there."""
        slab = bisect.bisect_right(self._starts, page) - 1
        return slab, page - self._starts[slab]

    def slab(self, layer: int, number: int) -> Tensor:
        """Keys and values of a slab's pages, `[2, kv_heads, pages, page, head_dim]`."""
        return self._slabs[layer][number]

    def ring(self, layer: int) -> Tensor:
        """Keys and values of every slot's window, `[2, slots, kv_heads, window, head_dim]`."""
        return self._rings[layer]
