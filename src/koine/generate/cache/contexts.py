"""Reading tokens into a `PagedCache`: stretches of one or several sequences, packed, or one token of each.

The decoder asks a reading for the positions of its tokens, gives it each layer's queries, keys and values, and gets the mixed
values back. A reading belongs to one forward pass; `finish` counts its tokens as read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from koine.generate.cache.page_runs import Run, attend_held, attend_runs, run_of, runs_worth_reading
from koine.generate.cache.paged_cache import SPARSE, CachedSequence, PagedCache
from koine.generate.cache.split_attention import mask_bias, merge_attention_states, partial_attention
from koine.model.attention.dispatch import attend, attend_cached

NOWHERE = 2**40
"""The first position of a page that is nobody's: later than any query."""


class PrefillContext:
    """`[1, time]` tokens: the next `counts[i]` of each sequence, one after another."""

    def __init__(self, cache: PagedCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        for sequence, count in zip(sequences, counts, strict=True):
            cache.reserve(sequence, count)
        self.cache, self.sequences, self.counts = cache, sequences, counts
        before = [sequence.length for sequence in sequences]
        spans = [torch.arange(b, b + n) for b, n in zip(before, counts, strict=True)]
        self._positions = torch.cat(spans)[None].to(cache.device)
        self._new = not any(before)
        self._starts: Tensor | None = None
        # On CPU each text is attended on its own: short ones are twice as fast without a mask (docs/explanation/log.md).
        self._together = self._new and (len(sequences) == 1 or cache.device.type != "cpu")
        if self._together and len(sequences) > 1:
            begins = torch.tensor([0, *counts[:-1]]).cumsum(0)
            self._starts = begins.repeat_interleave(torch.tensor(counts))[None].to(cache.device)

    @property
    def positions(self) -> Tensor:
        """`[1, time]`."""
        return self._positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Reading.attend`."""
        if self._together:
            # One call for all: they are the documents of a row.
            window = self.cache.windowed.get(layer)
            mixed = attend(q, k, v, window=window, document_starts=self._starts)
        else:
            parts = [
                self._attend_after(layer, sequence, q[:, part], k[:, part], v[:, part])
                for sequence, part in self._parts()
            ]
            mixed = torch.cat(parts, dim=1)
        self.keep(layer, k, v)
        return mixed

    def attend_packed(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """See `Reading.mix`."""
        k, v = new.unsqueeze(1)
        return self.attend(layer, q[None], k, v).view(q.shape)

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write a layer's keys and values `[1, time, kv_heads, head_dim]` where the sequences have them."""
        window = self.cache.windowed.get(layer)
        for sequence, part in self._parts():
            if window is None:
                self._write_pages(layer, sequence, k[0, part], v[0, part])
            else:
                self._write_ring(layer, window, sequence, k[0, part], v[0, part])

    def _parts(self) -> Iterator[tuple[CachedSequence, slice]]:
        """Each sequence with its stretch of the row."""
        start = 0
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            yield sequence, slice(start, start + count)
            start += count

    def _attend_after(self, layer: int, sequence: CachedSequence, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One sequence's new positions over those that it has read and themselves."""
        window = self.cache.windowed.get(layer)
        if not sequence.length:
            return attend(q, k, v, window=window, document_starts=None)
        held_k, held_v = (
            self._pages(layer, sequence) if window is None else self._ring(layer, window, sequence)
        )
        keys = torch.cat((held_k, k[0].transpose(0, 1)), dim=1)[None]
        values = torch.cat((held_v, v[0].transpose(0, 1)), dim=1)[None]
        return attend_cached(q, keys, values, window=window)

    def finish(self) -> None:
        """See `Reading.finish`."""
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            sequence.length += count

    def _pages(self, layer: int, sequence: CachedSequence) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions read before, `[kv_heads, before, head_dim]`."""
        before = sequence.length
        pages = sequence.pages[: self.cache.pages_for(before)]
        places = [self.cache.place_of(number) for number in pages]
        held = torch.cat([self.cache.slab(layer, slab)[:, :, at] for slab, at in places], dim=2)
        k, v = held[:, :, :before]
        return k, v

    def _ring(self, layer: int, window: int, sequence: CachedSequence) -> tuple[Tensor, Tensor]:
        """The last `window - 1` positions read before, oldest first."""
        before = sequence.length
        held = torch.arange(before - min(before, window - 1), before, device=self.cache.device) % window
        k, v = self.cache.ring(layer)[:, sequence.slot][:, :, held]
        return k, v

    def _write_pages(self, layer: int, sequence: CachedSequence, k: Tensor, v: Tensor) -> None:
        done, page = 0, self.cache.page
        while done < k.shape[0]:
            index, at = divmod(sequence.length + done, page)
            number, place = self.cache.place_of(sequence.pages[index])
            count = min(page - at, k.shape[0] - done)
            slab = self.cache.slab(layer, number)
            for part, new in enumerate((k, v)):
                slab[part, :, place, at : at + count] = new[done : done + count].transpose(0, 1)
            done += count

    def _write_ring(self, layer: int, window: int, sequence: CachedSequence, k: Tensor, v: Tensor) -> None:
        end = sequence.length + k.shape[0]
        count = min(window, k.shape[0])
        at = torch.arange(end - count, end, device=self.cache.device) % window
        ring = self.cache.ring(layer)
        for part, new in enumerate((k, v)):
            ring[part, sequence.slot].index_copy_(1, at, new[-count:].transpose(0, 1))


class PageGroup(NamedTuple):
    """Pages of one slab that are read together: a range read in place, or numbers to gather."""

    slab: int
    pages: slice | Tensor


@dataclass(frozen=True)
class PagePlan:
    """Which pages are read, and whose they are.

    groups: by slab; sizes: how many pages each has.
    rows: `[pages]` of all groups one after another, which query each page is for.
    first: `[pages]`, the position of each page's first key in its sequence; `NOWHERE` for a page in between that nobody asks for.
    """

    groups: Sequence[PageGroup]
    sizes: Sequence[int]
    rows: Tensor
    first: Tensor


class DecodeContext:
    """`[batch, 1]` tokens: the next one of each sequence. Reserves a position for each; raises `OutOfPages` where one has none.

    The sequences are those of the slots 0, 1, ..., in this order. Pass the reading of the step before as `last`: what both have in
    common is not worked out again.
    """

    def __init__(
        self, cache: PagedCache, sequences: Sequence[CachedSequence], last: DecodeContext | None = None
    ) -> None:
        for number, sequence in enumerate(sequences):
            if sequence.slot != number:
                raise ValueError("the sequences of a step take the first slots, in order")
            cache.reserve(sequence, 1)
        self.cache, self.sequences = cache, sequences
        lengths = [sequence.length for sequence in sequences]
        self._lengths = torch.tensor(lengths, device=cache.device)
        self._key = (cache.changes, len(sequences))
        self._runs: list[Run]
        self._plan: PagePlan | None
        self._stretches: dict[int, Tensor]
        if last is not None and last.cache is cache and last._key == self._key:
            self._runs, self._plan, self._stretches = last._runs, last._plan, last._stretches
        else:
            self._runs = runs_worth_reading(cache, sequences) if cache.full else []
            self._plan = None if self._runs or not cache.full else page_plan(cache, sequences)
            self._stretches = self._lone_stretches()
        if len(self._stretches) == len(cache.config.layers):
            return
        self._targets = self._page_targets(lengths) if cache.full else []
        self._added: Sequence[Tensor] = ()
        if self._plan is not None:
            # Of pages in the middle of a sequence nothing is hidden, of a last one what comes after the new token.
            last_seen = self._lengths[self._plan.rows] - self._plan.first
            places = torch.arange(cache.page, device=cache.device)
            added = mask_bias(places > last_seen[:, None], cache.dtype)
            self._added = torch.split(added, list(self._plan.sizes))
        self._rows = torch.arange(len(sequences), device=cache.device)
        self._ring_at: dict[int, Tensor] = {}
        self._ring_hidden: dict[int, Tensor | None] = {}
        for window in set(cache.windowed.values()):
            self._ring_at[window] = self._lengths % window
            filling = min(lengths) + 1 < window
            places = torch.arange(window, device=cache.device)
            self._ring_hidden[window] = (
                mask_bias(places > self._lengths[:, None], cache.dtype) if filling else None
            )

    def _lone_stretches(self) -> dict[int, Tensor]:
        """Layers whose keys and values the fused kernel of the CPU reads where they lie, `[2, 1, kv_heads, positions, head_dim]`: those of one sequence alone,
        for which every operation counts; its ring, and its pages where they are one run."""
        if len(self.sequences) > 1 or self.cache.device.type != "cpu":
            return {}
        found = {layer: self.cache.ring(layer)[:, :1] for layer in self.cache.windowed}
        if len(self._runs) == 1:
            [run] = self._runs
            found |= {layer: run_of(self.cache.slab(layer, run.slab), run) for layer in self.cache.full}
        return found

    def _page_targets(self, lengths: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Where each row's new key goes: by slab, rows, pages and places `[3, rows]`."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        for row, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            index, at = divmod(length, self.cache.page)
            slab, page = self.cache.place_of(sequence.pages[index])
            found.setdefault(slab, []).append((row, page, at))
        return [(slab, torch.tensor(places, device=self.cache.device).T) for slab, places in found.items()]

    @property
    def positions(self) -> Tensor:
        """`[batch, 1]`."""
        return self._lengths[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Reading.attend`; `time` is 1."""
        return self.attend_packed(layer, q[:, 0], torch.stack((k[:, 0], v[:, 0]))).flatten(1)[:, None]

    def attend_packed(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """See `Reading.mix`."""
        stretch = self._stretches.get(layer)
        if stretch is not None:
            # A run has a place for every position; a ring begins again.
            length = self.sequences[0].length
            stretch.select(3, length % stretch.shape[3]).copy_(new)
            return attend_held(q, stretch, length + 1)[0]
        window = self.cache.windowed.get(layer)
        if window is None:
            return self._over_pages(layer, q, new)
        return self._over_rings(layer, window, q, new)

    def finish(self) -> None:
        """See `Reading.finish`."""
        for sequence in self.sequences:
            sequence.length += 1

    def _over_rings(self, layer: int, window: int, q: Tensor, new: Tensor) -> Tensor:
        ring = self.cache.ring(layer)
        ring[:, self._rows, :, self._ring_at[window]] = new.transpose(0, 1)
        keys, values = ring[:, : len(self.sequences)]
        return partial_attention(q, keys, values, self._ring_hidden[window])[0]

    def _over_pages(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        for number, (rows, pages, places) in self._targets:
            self.cache.slab(layer, number)[:, :, pages, places] = new[:, rows].transpose(1, 2)
        plan = self._plan
        if plan is None:
            lengths = [sequence.length for sequence in self.sequences]
            return attend_runs(q, self._runs, lengths, lambda number: self.cache.slab(layer, number))
        mixed, sums = [], []
        queries = torch.split(q[plan.rows], list(plan.sizes))
        for group, query, added in zip(plan.groups, queries, self._added, strict=True):
            keys, values = self.cache.slab(layer, group.slab)[:, :, group.pages].transpose(1, 2)
            part, log_sum = partial_attention(query, keys, values, added)
            mixed.append(part)
            sums.append(log_sum)
        return merge_attention_states(torch.cat(mixed), torch.cat(sums), plan.rows, q.shape[0])


def page_plan(cache: PagedCache, sequences: Sequence[CachedSequence]) -> PagePlan:
    """The pages of all sequences, by slab; a page of several sequences is in one group for each."""
    uses: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    met: dict[int, int] = {}
    for row, sequence in enumerate(sequences):
        for index, number in enumerate(sequence.pages):
            again = met.get(number, 0)
            met[number] = again + 1
            # The first user of each page, then the second: within one group a page is read once.
            slab, place = cache.place_of(number)
            uses.setdefault((slab, again), []).append((place, row, index * cache.page))
    groups, sizes = [], []
    rows: list[int] = []
    starts: list[int] = []
    for (slab, _), found in sorted(uses.items()):
        found.sort()
        first, last = found[0][0], found[-1][0] + 1
        if len(found) >= SPARSE * (last - first):
            begin, count = len(rows), last - first
            rows += [0] * count
            starts += [NOWHERE] * count
            for page, row, start in found:
                rows[begin + page - first], starts[begin + page - first] = row, start
            groups.append(PageGroup(slab, slice(first, last)))
        else:
            count = len(found)
            rows += [row for _, row, _ in found]
            starts += [start for _, _, start in found]
            numbers = torch.tensor([page for page, _, _ in found], device=cache.device)
            groups.append(PageGroup(slab, numbers))
        sizes.append(count)
    return PagePlan(
        groups,
        sizes,
        torch.tensor(rows, device=cache.device),
        torch.tensor(starts, device=cache.device),
    )
