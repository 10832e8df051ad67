"""The data order: which documents a step sees, as a pure function of (mixture, seed, step).

A *component* is one language of one source. Sequence `i` of a phase belongs to the component that its block
of `BLOCK` sequences assigns to it. Every block holds each component equally often, evenly spread, in an order
drawn for the block. A sequence's position inside the component is the number of that component's sequences
before it. No state is kept between steps.

The batches of long rows in a phase (`Phase.long`) are numbered separately. Rows of another length than the
mixture's have their own shuffle of the same documents, and their own position in it.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from koine.data.batch import NO_TARGET, Batch
from koine.data.collate import fill, spans_of
from koine.data.components import Component, Packings, apportion, check_no_overlap, components_of
from koine.data.cut_text import count_cut_text, warn_of_cut_text
from koine.data.drawn import Drawn, merge_drawn
from koine.data.mixture import Mixture, Shape
from koine.data.packing import DocumentSlice
from koine.data.shards import TokenSource
from koine.errors import KoineWarning, UserError
from koine.files import sha256_file

BLOCK = 4096
"""Sequences over which proportions hold exactly, to 1 / BLOCK."""

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Tokens and epochs that a phase draws of a component, in rows of one length."""

    phase: str
    source: str
    language: str
    tokens: int
    epochs: float
    sequence_length: int


@dataclass(frozen=True)
class _BatchGroup:
    """The batches of one kind in a phase: its long rows, or its other rows."""

    phase: int
    long: bool
    shape: Shape
    steps: int
    components: list[Component]
    counts: NDArray[Any]
    """Sequences of each component in a block."""


class RowOrder:
    """Rows of a mixture, by step: the documents or groups that each holds. A subclass makes batches of them.

    Raises `UserError` if a source is missing or damaged, a named language is not in it, or the sources were
    made with different tokenizers.
    """

    holds_groups = False
    """Whether the sources hold groups of completions, not documents."""

    def __init__(self, mixture: Mixture, *, verify: bool = True) -> None:
        self.mixture = mixture
        opened: dict[Path, TokenSource] = {}
        for phase in mixture.phases:
            for source in phase.all_sources:
                if source.path not in opened:
                    opened[source.path] = TokenSource(source.path, verify=verify)
                    self._check_kind(opened[source.path])
        self.sources = opened
        made_by = {source.tokenizer_fingerprint for source in opened.values()}
        if len(made_by) > 1:
            raise UserError(
                f"the sources {', '.join(str(path) for path in opened)} were made with different tokenizers",
                hint="tokenize all of them with the tokenizer of the model",
            )
        packings: Packings = {}
        self._groups = {
            (index, long): self._group(index, long, packings)
            for index, phase in enumerate(mixture.phases)
            for long in ((False, True) if phase.long is not None else (False,))
        }
        self._manifests: dict[Path, str] = {}
        self._patterns: _RecentlyUsed[tuple[NDArray[Any], NDArray[Any]]] = _RecentlyUsed(8)
        self._offsets = self._first_sequences()
        self._warn_of_repeats()
        # Completions of groups are cut by `fit_segments`, which keeps one token of each at least.
        self.cut_text = () if self.holds_groups else count_cut_text(self._distinct_components())
        """Return the counts of text cut off from documents longer than a row; empty for `concat`."""
        warn_of_cut_text(self.cut_text)

    def _check_kind(self, source: TokenSource) -> None:
        """Raise `UserError` for groups in place of documents, or the other way round."""
        if self.holds_groups and source.kind == "documents":
            raise UserError(
                "holds documents, not groups of completions",
                where=source.path,
                hint="tokenize with --kind preferences, labelled or scored",
            )
        if not self.holds_groups and source.kind != "documents":
            raise UserError(
                f"holds groups of completions ({source.kind}), which are no text to train on one after another",
                where=source.path,
                hint="use `koine align train`, or tokenize the answers to take with --take",
            )

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of the tokenizer of all sources."""
        return next(iter(self.sources.values())).tokenizer_fingerprint

    def _group(self, index: int, long: bool, packings: Packings) -> _BatchGroup:
        """Build the batch group of a phase's long rows, or of its other rows."""
        phase, shape = self.mixture.phases[index], self.mixture.phase_shape(index, long=long)
        sources = phase.long.sources if long and phase.long is not None else ()
        components = [
            component
            for source in sources or phase.sources
            for component in components_of(
                source, self.sources[source.path], self.mixture, shape.sequence_length, packings
            )
        ]
        check_no_overlap(phase.name, components)
        counts = apportion(np.array([component.weight for component in components]), BLOCK)
        return _BatchGroup(index, long, shape, self.mixture.phase_steps(index, long=long), components, counts)

    # --- component of a sequence, and position in it ---

    def _pattern(self, group: _BatchGroup, block: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return component and rank of each sequence of a block.

        The rank counts the sequences of the same component before it in the block.
        """

        def draw() -> tuple[NDArray[Any], NDArray[Any]]:
            counts = group.counts
            salt = 0x10B6 if group.long else 0xB10C
            generator = np.random.Generator(np.random.Philox([self.mixture.seed, group.phase, block, salt]))
            component = np.repeat(np.arange(len(counts)), counts)
            rank = np.concatenate([np.arange(count) for count in counts])
            # Each component's sequences are spread evenly, from its own random start.
            keys = (rank + generator.random(len(counts))[component]) / counts[component]
            order = np.argsort(keys, kind="stable")
            return component[order], rank[order]

        return self._patterns.get_or_compute((group.phase, group.long, block), draw)

    def _first_sequences(self) -> dict[tuple[int, bool], list[int]]:
        """Return the sequences drawn in earlier phases and trainings, per batch group and component.

        Only sequences of the same length count.
        """
        before = {one.key: one.documents for one in self.mixture.drawn}
        drawn: Counter[int] = Counter()
        for component in self._distinct_components() if before else ():
            documents = before.get(self._key(component), 0)
            if documents:
                drawn[id(component.packing)] = component.packing.first_row_after(documents)
        offsets = {}
        for name, group in self._groups.items():
            # Components that draw the same rows share one packing.
            offsets[name] = [drawn[id(component.packing)] for component in group.components]
            for component, used in zip(group.components, self._drawn(group), strict=True):
                drawn[id(component.packing)] += used
        return offsets

    def _distinct_components(self) -> list[Component]:
        """Return one component for each distinct order of documents."""
        found = {id(one.packing): one for group in self._groups.values() for one in group.components}
        return list(found.values())

    def _key(self, component: Component) -> tuple[str, str, tuple[int, ...]]:
        """Return `Drawn.key` of a component."""
        path = component.source.path
        if path not in self._manifests:
            self._manifests[path] = sha256_file(path / "manifest.json")
        return self._manifests[path], component.language, component.packing.shuffle

    def drawn(self) -> tuple[Drawn, ...]:
        """Return the documents that all steps draw of each source and language, and those drawn before."""
        rows: dict[int, int] = {}
        for name, group in self._groups.items():
            counts = zip(group.components, self._offsets[name], self._drawn(group), strict=True)
            for component, before, used in counts:
                rows[id(component.packing)] = max(rows.get(id(component.packing), 0), before + used)
        found = []
        for component in self._distinct_components():
            source, language, shuffle = self._key(component)
            documents = component.packing.documents_before(rows[id(component.packing)])
            found.append(Drawn(source=source, language=language, shuffle=shuffle, documents=documents))
        return merge_drawn([self.mixture.drawn, found])

    def _drawn(self, group: _BatchGroup) -> list[int]:
        """Count the sequences of each component in all steps of a batch group."""
        blocks, rest = divmod(group.steps * group.shape.batch_size, BLOCK)
        counts = group.counts * blocks
        if rest:
            counts = counts + np.bincount(self._pattern(group, blocks)[0][:rest], minlength=len(counts))
        return [int(count) for count in counts]

    def _rows(self, step: int, rows: range) -> list[tuple[Component, list[DocumentSlice]]]:
        """Return component and document slices of some rows of a step."""
        place = self.mixture.position(step)
        group, offsets = self._groups[place.phase, place.long], self._offsets[place.phase, place.long]
        out = []
        for row in rows:
            block, index = divmod(place.number * group.shape.batch_size + row, BLOCK)
            which, rank = self._pattern(group, block)
            number = int(which[index])
            component = group.components[number]
            before = offsets[number] + block * int(group.counts[number]) + int(rank[index])
            out.append((component, component.packing.row(before)))
        return out

    # --- rows ---

    def rows_of(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> tuple[list[tuple[Component, list[DocumentSlice]]], int]:
        """Return component and document slices of the rows of `rank` at `step`, and the tokens of a row.

        Ranks hold consecutive, equal parts of the global batch. `micro_batch` takes a slice of them.
        """
        time, size = self.mixture.shape(step)
        if size % world_size:
            raise UserError(
                f"a batch of {size} sequences cannot be split over {world_size} processes",
                hint="choose a batch size that is a multiple of their number",
            )
        share = size // world_size
        rows = range(size)[rank * share : (rank + 1) * share]
        if micro_batch is not None:
            rows = rows[micro_batch]
        return self._rows(step, rows), time

    # --- totals ---

    def usage(self) -> list[Usage]:
        """Return tokens and epochs of each component, phase by phase.

        Rows of two lengths count separately.
        """
        return [
            Usage(
                self.mixture.phases[group.phase].name,
                component.source.name,
                component.language,
                drawn * group.shape.sequence_length,
                drawn / component.packing.rows_in_epoch(),
                group.shape.sequence_length,
            )
            for group in self._groups.values()
            for component, drawn in zip(group.components, self._drawn(group), strict=True)
        ]

    def _warn_of_repeats(self) -> None:
        """Warn of documents that are repeated more often than `max_epochs`."""
        passes: dict[tuple[str, str], float] = {}
        limits: dict[tuple[str, str], tuple[float, str]] = {}
        for group in self._groups.values():
            for component, drawn in zip(group.components, self._drawn(group), strict=True):
                key = component.key
                passes[key] = passes.get(key, 0.0) + drawn / component.packing.rows_in_epoch()
                limits[key] = (component.source.max_epochs, component.source.name)
        over = [
            f"{limits[key][1]}/{key[1]} {count:.1f} times (limit {limits[key][0]:g})"
            for key, count in passes.items()
            if count > limits[key][0]
        ]
        if over:
            warnings.warn(
                f"these documents are repeated: {', '.join(over)}; "
                "add text, lower their share, or raise max_epochs",
                KoineWarning,
                stacklevel=3,
            )


class DataOrder(RowOrder):
    """Batches of a mixture of documents, by step.

    Raises `UserError` as `RowOrder`, and for sources of groups.
    """

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> Batch:
        """Return the documents in the rows of `rank` at `step`; `micro_batch` takes a slice of the rows."""
        content, time = self.rows_of(step, rank=rank, world_size=world_size, micro_batch=micro_batch)
        cross = self.mixture.cross_document_attention
        tokens = np.zeros((len(content), time), dtype=np.int64)
        targets = np.full((len(content), time), NO_TARGET, dtype=np.int64)
        ids = np.full((len(content), time), -1, dtype=np.int32)
        for index, (component, pieces) in enumerate(content):
            fill(component, pieces, tokens[index], targets[index], ids[index], cross=cross)
        document_ids = None
        if not cross:
            document_ids = torch.from_numpy(ids)
        return Batch(
            torch.from_numpy(tokens), torch.from_numpy(targets), document_ids, lambda: spans_of(content, time)
        )


class _RecentlyUsed(OrderedDict[Any, T]):
    """A cache of the values that were used last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def get_or_compute(self, key: Any, compute: Callable[[], T]) -> T:
        """Return the value of a key; compute and remember it where it is not there."""
        if key in self:
            self.move_to_end(key)
        else:
            self[key] = compute()
            if len(self) > self._size:
                self.popitem(last=False)
        value: T = self[key]
        return value
