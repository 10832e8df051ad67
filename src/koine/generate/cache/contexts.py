"""Prefill and decode over a `PagedCache`: the attention contexts of one forward pass.

The decoder asks a context for the positions of its tokens. It gives each layer's queries, keys and values,
and gets the attention's output. A context belongs to one forward pass; `finish` adds its tokens to the
lengths of the sequences.

Shapes: b sequences, t new tokens, k key heads, g query heads of a key head, d head size, s cached positions,
w window (`q_bkgd`, `k_tkd`; "2" stands for keys and values).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from koine.generate.cache.page_plan import PagePlan, build_page_plan
from koine.generate.cache.page_runs import PageRun, attend_range, attend_runs, run_view, runs_for_fused_kernel
from koine.generate.cache.paged_cache import CachedSequence, PagedCache
from koine.generate.cache.split_attention import mask_bias, merge_attention_states, partial_attention
from koine.model.attention.dispatch import attend, attend_cached


class PrefillContext:
    """`[1, t]` tokens: the next `counts[i]` of each sequence, one sequence after another."""

    def __init__(self, cache: PagedCache, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        """Reserve pages for the tokens. Raises `OutOfPages` where the cache has too few."""
        for sequence, count in zip(sequences, counts, strict=True):
            cache.reserve(sequence, count)
        self.cache, self.sequences, self.counts = cache, sequences, counts
        cached = [sequence.length for sequence in sequences]
        ranges = [torch.arange(start, start + count) for start, count in zip(cached, counts, strict=True)]
        self._positions = torch.cat(ranges)[None].to(cache.device)
        self._starts: Tensor | None = None
        # On CPU each sequence is attended alone: without a mask short ones are twice as fast
        # (docs/explanation/log.md).
        self._packed = not any(cached) and (len(sequences) == 1 or cache.device.type != "cpu")
        if self._packed and len(sequences) > 1:
            starts = torch.tensor([0, *counts[:-1]]).cumsum(0)
            self._starts = starts.repeat_interleave(torch.tensor(counts))[None].to(cache.device)

    @property
    def positions(self) -> Tensor:
        """Positions for RoPE, `[1, t]`."""
        return self._positions

    @property
    def lengths(self) -> Tensor:
        """Lengths of the sequences after this pass, `[1, t]`."""
        ends = [sequence.length + count for sequence, count in zip(self.sequences, self.counts, strict=True)]
        return torch.tensor(ends).repeat_interleave(torch.tensor(self.counts))[None].to(self.cache.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values, then attend (`AttentionContext.attend`)."""
        if self._packed:
            # One call for all sequences: they are the documents of a row.
            window = self.cache.windowed.get(layer)
            out = attend(q, k, v, window=window, document_starts=self._starts, softcap=self.cache.softcap)
        else:
            outputs = [
                self._attend_sequence(layer, sequence, q[:, span], k[:, span], v[:, span])
                for sequence, span in self._spans()
            ]
            out = torch.cat(outputs, dim=1)
        self.write_kv(layer, k, v)
        return out

    def attend_packed(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Store and attend for tokens in one row (`PackedAttentionContext.attend_packed`)."""
        k, v = new.unsqueeze(1)
        return self.attend(layer, q[None], k, v).view(q.shape)

    def write_kv(self, layer: int, k_1tkd: Tensor, v_1tkd: Tensor) -> None:
        """Write a layer's keys and values into the cache."""
        window = self.cache.windowed.get(layer)
        for sequence, span in self._spans():
            if window is None:
                self._write_pages(layer, sequence, k_1tkd[0, span], v_1tkd[0, span])
            else:
                self._write_ring(layer, window, sequence, k_1tkd[0, span], v_1tkd[0, span])

    def finish(self) -> None:
        """Add the tokens of this pass to the lengths of the sequences."""
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            sequence.length += count

    def _spans(self) -> Iterator[tuple[CachedSequence, slice]]:
        """Yield each sequence with its range of the row."""
        start = 0
        for sequence, count in zip(self.sequences, self.counts, strict=True):
            yield sequence, slice(start, start + count)
            start += count

    def _attend_sequence(
        self, layer: int, sequence: CachedSequence, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        """Attend one sequence's new tokens to its cached positions and to themselves."""
        window = self.cache.windowed.get(layer)
        if not sequence.length:
            return attend(q, k, v, window=window, document_starts=None, softcap=self.cache.softcap)
        cached_k, cached_v = (
            self._read_pages(layer, sequence) if window is None else self._read_ring(layer, window, sequence)
        )
        keys = torch.cat((cached_k, k[0].transpose(0, 1)), dim=1)[None]
        values = torch.cat((cached_v, v[0].transpose(0, 1)), dim=1)[None]
        return attend_cached(q, keys, values, window=window, softcap=self.cache.softcap)

    def _read_pages(self, layer: int, sequence: CachedSequence) -> tuple[Tensor, Tensor]:
        """Return the cached keys and values of a sequence, `[k, s, d]` each."""
        pages = sequence.pages[: self.cache.pages_for(sequence.length)]
        places = [self.cache.locate(number) for number in pages]
        cached = torch.cat([self.cache.slab(layer, slab)[:, :, place] for slab, place in places], dim=2)
        k, v = cached[:, :, : sequence.length]
        return k, v

    def _read_ring(self, layer: int, window: int, sequence: CachedSequence) -> tuple[Tensor, Tensor]:
        """Return keys and values of the last `window - 1` positions, oldest first, `[k, s, d]` each."""
        length = sequence.length
        positions = torch.arange(length - min(length, window - 1), length, device=self.cache.device)
        k, v = self.cache.ring(layer)[:, sequence.slot][:, :, positions % window]
        return k, v

    def _write_pages(self, layer: int, sequence: CachedSequence, k_tkd: Tensor, v_tkd: Tensor) -> None:
        done, page = 0, self.cache.page
        while done < k_tkd.shape[0]:
            index, offset = divmod(sequence.length + done, page)
            number, place = self.cache.locate(sequence.pages[index])
            count = min(page - offset, k_tkd.shape[0] - done)
            slab = self.cache.slab(layer, number)
            for half, new in enumerate((k_tkd, v_tkd)):
                slab[half, :, place, offset : offset + count] = new[done : done + count].transpose(0, 1)
            done += count

    def _write_ring(
        self, layer: int, window: int, sequence: CachedSequence, k_tkd: Tensor, v_tkd: Tensor
    ) -> None:
        end = sequence.length + k_tkd.shape[0]
        count = min(window, k_tkd.shape[0])
        places = torch.arange(end - count, end, device=self.cache.device) % window
        ring = self.cache.ring(layer)
        for half, new in enumerate((k_tkd, v_tkd)):
            ring[half, sequence.slot].index_copy_(1, places, new[-count:].transpose(0, 1))


class DecodeContext:
    """`[b, 1]` tokens: the next one of each sequence."""

    def __init__(
        self, cache: PagedCache, sequences: Sequence[CachedSequence], last: DecodeContext | None = None
    ) -> None:
        """Reserve one position for each sequence. Raises `OutOfPages` where the cache has too few pages.

        Args:
            cache: the KV cache.
            sequences: those in the slots 0, 1, ..., in this order.
            last: the context of the step before; its plan is used again where it still holds.
        """
        for number, sequence in enumerate(sequences):
            if sequence.slot != number:
                raise ValueError("the sequences of a step take the first slots, in order")
            cache.reserve(sequence, 1)
        self.cache, self.sequences = cache, sequences
        lengths = [sequence.length for sequence in sequences]
        self._lengths = torch.tensor(lengths, device=cache.device)
        self._key = (cache.changes, len(sequences))
        self._runs: list[PageRun]
        self._plan: PagePlan | None
        self._views: dict[int, Tensor]
        if last is not None and last.cache is cache and last._key == self._key:
            self._runs, self._plan, self._views = last._runs, last._plan, last._views
        else:
            self._runs = runs_for_fused_kernel(cache, sequences) if cache.full else []
            self._plan = None if self._runs or not cache.full else build_page_plan(cache, sequences)
            self._views = self._contiguous_views()
        if len(self._views) == len(cache.config.layers):
            return
        self._targets = self._page_targets(lengths) if cache.full else []
        self._page_bias: Sequence[Tensor] = self._mask_pages(self._plan) if self._plan is not None else ()
        self._rows = torch.arange(len(sequences), device=cache.device)
        self._ring_places: dict[int, Tensor] = {}
        self._ring_bias: dict[int, Tensor | None] = {}
        for window in set(cache.windowed.values()):
            self._ring_places[window] = self._lengths % window
            filling = min(lengths) + 1 < window
            places = torch.arange(window, device=cache.device)
            self._ring_bias[window] = (
                mask_bias(places > self._lengths[:, None], cache.dtype) if filling else None
            )

    @property
    def positions(self) -> Tensor:
        """Positions for RoPE, `[b, 1]`."""
        return self._lengths[:, None]

    @property
    def lengths(self) -> Tensor:
        """Lengths of the sequences after this pass, `[b, 1]`."""
        return self._lengths[:, None] + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values, then attend (`AttentionContext.attend`); `time` is 1."""
        return self.attend_packed(layer, q[:, 0], torch.stack((k[:, 0], v[:, 0]))).flatten(1)[:, None]

    def attend_packed(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Store and attend for tokens in one row (`PackedAttentionContext.attend_packed`)."""
        view = self._views.get(layer)
        if view is not None:
            # A run has a place for every position; a ring starts again at its end.
            length = self.sequences[0].length
            view.select(3, length % view.shape[3]).copy_(new)
            return attend_range(q, view, length + 1, self.cache.softcap)
        window = self.cache.windowed.get(layer)
        if window is None:
            return self._attend_pages(layer, q, new)
        return self._attend_rings(layer, window, q, new)

    def finish(self) -> None:
        """Add the token of this pass to the length of each sequence."""
        for sequence in self.sequences:
            sequence.length += 1

    def _contiguous_views(self) -> dict[int, Tensor]:
        """Return keys and values `[2, 1, k, s, d]` of layers that the CPU's fused kernel reads in place.

        A single sequence has them, where every operation counts: its rings, and its pages where they are one
        run.
        """
        if len(self.sequences) > 1 or self.cache.device.type != "cpu":
            return {}
        views = {layer: self.cache.ring(layer)[:, :1] for layer in self.cache.windowed}
        if len(self._runs) == 1:
            [run] = self._runs
            views |= {layer: run_view(self.cache.slab(layer, run.slab), run) for layer in self.cache.full}
        return views

    def _page_targets(self, lengths: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Return where each row's new key is written: by slab, `[3, rows]` of rows, pages and offsets."""
        targets: dict[int, list[tuple[int, int, int]]] = {}
        for row, (sequence, length) in enumerate(zip(self.sequences, lengths, strict=True)):
            index, offset = divmod(length, self.cache.page)
            slab, page = self.cache.locate(sequence.pages[index])
            targets.setdefault(slab, []).append((row, page, offset))
        return [(slab, torch.tensor(places, device=self.cache.device).T) for slab, places in targets.items()]

    def _mask_pages(self, plan: PagePlan) -> Sequence[Tensor]:
        """Return the mask bias of each group's pages: it masks keys after the new token."""
        last_offset = self._lengths[plan.rows] - plan.first
        offsets = torch.arange(self.cache.page, device=self.cache.device)
        bias = mask_bias(offsets > last_offset[:, None], self.cache.dtype)
        return torch.split(bias, list(plan.sizes))

    def _attend_rings(self, layer: int, window: int, q_bkgd: Tensor, new_2bkd: Tensor) -> Tensor:
        ring = self.cache.ring(layer)
        ring[:, self._rows, :, self._ring_places[window]] = new_2bkd.transpose(0, 1)
        keys_bkwd, values_bkwd = ring[:, : len(self.sequences)]
        bias = self._ring_bias[window]
        return partial_attention(q_bkgd, keys_bkwd, values_bkwd, bias, self.cache.softcap)[0]

    def _attend_pages(self, layer: int, q_bkgd: Tensor, new_2bkd: Tensor) -> Tensor:
        for number, (rows, pages, offsets) in self._targets:
            self.cache.slab(layer, number)[:, :, pages, offsets] = new_2bkd[:, rows].transpose(1, 2)
        plan = self._plan
        if plan is None:
            lengths = [sequence.length for sequence in self.sequences]
            return attend_runs(
                q_bkgd,
                self._runs,
                lengths,
                lambda number: self.cache.slab(layer, number),
                self.cache.softcap,
            )
        outputs, log_sums = [], []
        queries = torch.split(q_bkgd[plan.rows], list(plan.sizes))
        for group, query, bias in zip(plan.groups, queries, self._page_bias, strict=True):
            keys, values = self.cache.slab(layer, group.slab)[:, :, group.pages].transpose(1, 2)
            output, log_sum = partial_attention(query, keys, values, bias, self.cache.softcap)
            outputs.append(output)
            log_sums.append(log_sum)
        return merge_attention_states(torch.cat(outputs), torch.cat(log_sums), plan.rows, q_bkgd.shape[0])
