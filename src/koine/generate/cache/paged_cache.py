"""KV cache of many sequences of different lengths: pages for full attention, ring buffers for windows.

A layer with full attention stores keys and values in pages of `page` positions. Pages lie in slabs, which are
allocated when needed and freed when empty, so that memory follows use. Sequences with a common prefix share
its pages. A layer with a sliding window stores a ring buffer of `window` positions for each sequence: a new
position replaces the one that left the window. Keys are stored after RoPE, so their order in a ring does not
matter.

A decode step attends for all sequences together. The scores of a slab's pages are one matmul, read in place
whichever sequences own them; the results of a sequence's pages are merged by log-sum-exp.
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
"""Positions in a page."""

SLAB = 32
"""Pages in the first slab."""

DOUBLING = 256
"""Up to so many pages a slab doubles the cache, so that slabs are few. Later ones add a quarter."""

SPARSE = 0.5
"""Pages are gathered instead of read in place where fewer than this share of a slab's range is needed."""


def slab_pages(pages: int) -> int:
    """Return the size of the next slab, given the pages so far."""
    return max(SLAB, pages if pages < DOUBLING else pages // 4)


@dataclass(eq=False)
class CachedSequence:
    """One sequence in the cache.

    slot: its row in the ring buffers. length: cached positions. pages: page numbers, in order.
    """

    slot: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prefix:
    """The KV cache of a prefix: its length, its pages (not freed meanwhile), and a copy of its windows."""

    length: int
    pages: tuple[int, ...]
    rings: tuple[Tensor, ...]

    def bytes(self) -> int:
        """Return the bytes of the windows (the cache counts the pages)."""
        return sum(ring.nbytes for ring in self.rings)


class OutOfPages(Exception):  # noqa: N818
    """The cache is full: pages must be freed first."""


class PagedCache:
    """Keys and values of sequences, in one dtype on one device.

    full: indices of layers with full attention. windowed: window of each other layer, by index.
    max_pages: most pages in use at once; `OutOfPages` is raised where more are needed.
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
        self.softcap = config.attention_softcap
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
        """Counts changes of sequences and pages: a decode plan holds while it is the same."""

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

    # -- sequences ---

    def add(self, prefix: Prefix | None = None) -> CachedSequence:
        """Return a new sequence in the last slot, empty or continuing a prefix."""
        slot = len(self.sequences)
        for index, ring in self._rings.items():
            if slot == ring.shape[1]:
                grown = self._new_ring(self.windowed[index], slot + max(1, slot // 4))
                grown[:, :slot] = ring
                self._rings[index] = grown
        sequence = CachedSequence(slot)
        if prefix is not None:
            full_pages = prefix.length // self.page
            partial: int | None = None
            if full_pages < len(prefix.pages):
                # The last page is not full, and its first owner may write to the rest of it: copy it.
                [partial] = self._allocate(1)
                (source, at), (target, to) = self.locate(prefix.pages[full_pages]), self.locate(partial)
                for slabs in self._slabs.values():
                    slabs[target][:, :, to] = slabs[source][:, :, at]
            for number in prefix.pages[:full_pages]:
                self._ref_counts[number] += 1
            sequence.pages = [*prefix.pages[:full_pages], *([] if partial is None else [partial])]
            sequence.length = prefix.length
            for ring, copy in zip(self._rings.values(), prefix.rings, strict=True):
                ring[:, slot, :, : copy.shape[2]] = copy
        self.sequences.append(sequence)
        self.changes += 1
        return sequence

    def remove(self, sequence: CachedSequence) -> None:
        """Remove a sequence. The sequence of the last slot moves into its slot, so that slots stay dense."""
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
        """Move these sequences to the slots 0, 1, ..., swapping with those there."""
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
        """Return a sequence as it is now, to start others with. Its pages are in use until `release`."""
        for number in sequence.pages:
            self._ref_counts[number] += 1
        rings = []
        for index, ring in self._rings.items():
            filled = min(sequence.length, self.windowed[index])
            rings.append(ring[:, sequence.slot, :, :filled].clone())
        return Prefix(sequence.length, tuple(sequence.pages), tuple(rings))

    def release(self, prefix: Prefix) -> None:
        """Free the pages of a prefix that nothing else uses."""
        self._release_pages(prefix.pages)

    # -- pages ---

    def pages_for(self, positions: int) -> int:
        """Return the number of pages for so many positions."""
        return -(-positions // self.page) if self.full else 0

    @property
    def pages_in_use(self) -> int:
        """Number of pages that a sequence or prefix uses."""
        return len(self._ref_counts)

    @property
    def slabs(self) -> int:
        """Number of allocated slabs."""
        return len(self._starts)

    def pages_left(self) -> float:
        """Return the number of pages that may still be allocated."""
        return float("inf") if self.max_pages is None else self.max_pages - len(self._ref_counts)

    def reserve(self, sequence: CachedSequence, positions: int) -> None:
        """Allocate pages for `positions` more.

        Raises `OutOfPages`, and allocates none, where there are too few.
        """
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
        # The lowest numbers first: pages in use stay close together, and the last slabs become empty.
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
        # One empty slab stays, so that the end of a sequence and the start of the next do not free and
        # allocate it.
        if len(self._starts) > needed + 1:
            self._pages = self._starts[needed + 1]
            del self._starts[needed + 1 :]
            for slabs in self._slabs.values():
                del slabs[needed + 1 :]
            self._free = [number for number in self._free if number < self._pages]
            heapq.heapify(self._free)

    # -- bytes ---

    def bytes_held(self) -> int:
        """Return the bytes of keys and values in use, counted in the tensors.

        Counted are whole pages in use (a shared one once) and the filled positions of each sequence's ring
        buffers. Copies of ring buffers in cached prefixes are not (`Prefix.bytes`).
        """
        held = 0
        for number in self._ref_counts:
            slab, at = self.locate(number)
            held += sum(slabs[slab][:, :, at].nbytes for slabs in self._slabs.values())
        for ring in self._rings.values():
            held += sum(ring[:, one.slot, :, : one.length].nbytes for one in self.sequences)
        return held

    def bytes_reserved(self) -> int:
        """Return the bytes that are allocated: slabs and ring buffers, unused positions included."""
        slabs = sum(slab.nbytes for slabs in self._slabs.values() for slab in slabs)
        return slabs + sum(ring.nbytes for ring in self._rings.values())

    # -- tensors ---

    def locate(self, page: int) -> tuple[int, int]:
        """Return the slab of a page, and the page's index in it."""
        slab = bisect.bisect_right(self._starts, page) - 1
        return slab, page - self._starts[slab]

    def slab(self, layer: int, number: int) -> Tensor:
        """Return keys and values of a slab's pages, `[2, kv_heads, pages, page, head_dim]`."""
        return self._slabs[layer][number]

    def ring(self, layer: int) -> Tensor:
        """Return keys and values of every slot's window, `[2, slots, kv_heads, window, head_dim]`."""
        return self._rings[layer]
