"""The data order: which documents a step sees, as a pure function of (mixture, seed, step).

A *component* is one language of one source. Sequence `i` of a phase belongs to the component that a block of `BLOCK` sequences assigns
it (every block holds each component in the same numbers, spread evenly, in an order drawn for the block), and its place inside
the component is the number of that component's sequences before it. Nothing is remembered between steps.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from koine.data.batch import NO_TARGET, Batch, Span
from koine.data.mixture import Mixture, Source
from koine.data.packing import Pieces, StreamPacking, WholePacking
from koine.data.shards import TokenSource
from koine.errors import KoineWarning, UserError, did_you_mean

BLOCK = 4096
"""Sequences in which proportions hold exactly, to 1 / BLOCK."""

T = TypeVar("T")


@dataclass(frozen=True)
class Component:
    """One language of one source, in one phase."""

    source: Source
    tokens: TokenSource
    language: str
    weight: float
    packing: StreamPacking | WholePacking

    @property
    def key(self) -> tuple[str, str]:
        """What makes two components of different phases the same documents."""
        return str(self.source.path), self.language


@dataclass(frozen=True)
class Use:
    """How much of a component a phase draws."""

    phase: str
    source: str
    language: str
    tokens: int
    epochs: float


class DataOrder:
    """Batches of a mixture, by step.

    Raises `UserError` where a source is missing or damaged, a named language is not in it, the sources were made with different
    tokenizers, or chats and plain documents are mixed under one loss mask.
    """

    def __init__(self, mixture: Mixture, *, verify: bool = True) -> None:
        self.mixture = mixture
        opened: dict[Path, TokenSource] = {}
        for phase in mixture.phases:
            for source in phase.sources:
                if source.path not in opened:
                    opened[source.path] = TokenSource(source.path, verify=verify)
        self.sources = opened
        made_by = {source.tokenizer_fingerprint for source in opened.values()}
        if len(made_by) > 1:
            raise UserError(
                f"the sources {', '.join(str(path) for path in opened)} were made with different tokenizers",
                mend="tokenize all of them with the tokenizer of the model",
            )
        packings: dict[tuple[str, str], StreamPacking | WholePacking] = {}
        self.components = [
            [c for s in phase.sources for c in self._components(s, opened[s.path], packings)]
            for phase in mixture.phases
        ]
        for phase, components in zip(mixture.phases, self.components, strict=True):
            _refuse_twice(phase.name, components)
        self._counts = [_apportion(np.array([c.weight for c in cs]), BLOCK) for cs in self.components]
        self._offsets = self._phase_offsets()
        self._patterns: _Recent[tuple[NDArray[Any], NDArray[Any]]] = _Recent(8)
        self._warn_of_repeats()
        self._warn_of_cut_documents(packings)

    @property
    def tokenizer_fingerprint(self) -> str:
        """sha256 of the tokenizer that made all sources."""
        return next(iter(self.sources.values())).tokenizer_fingerprint

    def _components(
        self,
        source: Source,
        tokens: TokenSource,
        packings: dict[tuple[str, str], StreamPacking | WholePacking],
    ) -> Iterator[Component]:
        present = np.unique(tokens.languages).tolist()
        totals = {code: int(tokens.lengths[tokens.languages == code].sum()) for code in present}
        if not sum(totals.values()):
            raise UserError("holds no tokens", where=source.path, mend="tokenize a source that has documents")
        if source.languages is None:
            power = 1.0 / (source.temperature or 1.0)
            weights = {code: total**power for code, total in totals.items()}
        else:
            for code in source.languages:
                if code not in totals:
                    raise UserError(
                        f"holds no document in '{code}'", where=source.path, mend=did_you_mean(code, totals)
                    )
            weights = dict(source.languages)
        scale = source.proportion / sum(weights.values())
        for code, weight in sorted(weights.items()):
            key = (str(source.path), code)
            if key not in packings:
                documents = np.flatnonzero(tokens.languages == code)
                kind = StreamPacking if self.mixture.packing == "stream" else WholePacking
                stream = _stable_number(key[1])
                packings[key] = kind(
                    documents, tokens.lengths, self.mixture.sequence_length, (self.mixture.seed, stream)
                )
            yield Component(source, tokens, code, weight * scale, packings[key])

    # -- which component, and where in it ------------------------------------------------------------------------------

    def _pattern(self, phase: int, block: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """For each sequence of a block its component, and how many of that component came before it in the block."""

        def draw() -> tuple[NDArray[Any], NDArray[Any]]:
            counts = self._counts[phase]
            generator = np.random.Generator(np.random.Philox([self.mixture.seed, phase, block, 0xB10C]))
            component = np.repeat(np.arange(len(counts)), counts)
            rank = np.concatenate([np.arange(count) for count in counts])
            # Each component's sequences are spread evenly, from a start of its own.
            keys = (rank + generator.random(len(counts))[component]) / counts[component]
            order = np.argsort(keys, kind="stable")
            return component[order], rank[order]

        return self._patterns.get((phase, block), draw)

    def _phase_offsets(self) -> list[list[int]]:
        """Per phase and component: sequences of the same documents drawn in earlier phases."""
        drawn: dict[tuple[str, str], int] = {}
        offsets = []
        self._patterns = _Recent(8)
        for index, phase in enumerate(self.mixture.phases):
            offsets.append([drawn.get(component.key, 0) for component in self.components[index]])
            for component, used in zip(self.components[index], self._drawn(index, phase.steps), strict=True):
                drawn[component.key] = drawn.get(component.key, 0) + used
        return offsets

    def _drawn(self, phase: int, steps: int) -> list[int]:
        """Sequences of each component in the first `steps` steps of a phase."""
        blocks, rest = divmod(steps * self.mixture.batch_size, BLOCK)
        counts = self._counts[phase] * blocks
        if rest:
            counts = counts + np.bincount(self._pattern(phase, blocks)[0][:rest], minlength=len(counts))
        return [int(count) for count in counts]

    def _locate(self, step: int) -> tuple[int, int]:
        """Phase of a step, and the step's number inside the phase."""
        if not 0 <= step < self.mixture.steps:
            raise UserError(
                f"step {step} is outside the mixture", mend=f"it has the steps 0 to {self.mixture.steps - 1}"
            )
        for index, phase in enumerate(self.mixture.phases):
            if step < phase.steps:
                return index, step
            step -= phase.steps
        raise AssertionError("unreachable")

    def _rows(self, step: int, rows: range) -> list[tuple[Component, list[Pieces]]]:
        phase, inside = self._locate(step)
        out = []
        for row in rows:
            block, index = divmod(inside * self.mixture.batch_size + row, BLOCK)
            which, rank = self._pattern(phase, block)
            number = int(which[index])
            component = self.components[phase][number]
            place = self._offsets[phase][number] + block * int(self._counts[phase][number]) + int(rank[index])
            out.append((component, component.packing.row(place)))
        return out

    # -- batches -------------------------------------------------------------------------------------------------------

    def batch(
        self, step: int, *, rank: int = 0, world_size: int = 1, micro_batch: slice | None = None
    ) -> Batch:
        """The rows of `rank` at `step`; `micro_batch` takes a slice of those.

        Ranks hold consecutive, equal parts of the global batch.
        """
        size = self.mixture.batch_size
        if size % world_size:
            raise UserError(
                f"a batch of {size} sequences cannot be split over {world_size} processes",
                mend="choose a batch size that is a multiple of their number",
            )
        share = size // world_size
        rows = range(size)[rank * share : (rank + 1) * share]
        if micro_batch is not None:
            rows = rows[micro_batch]
        content = self._rows(step, rows)
        time = self.mixture.sequence_length
        cross = self.mixture.cross_document_attention
        tokens = np.zeros((len(content), time), dtype=np.int64)
        targets = np.full((len(content), time), NO_TARGET, dtype=np.int64)
        ids = np.full((len(content), time), -1, dtype=np.int32)
        for index, (component, pieces) in enumerate(content):
            _fill(component, pieces, tokens[index], targets[index], ids[index], cross=cross)
        document_ids = None
        if not cross:
            document_ids = torch.from_numpy(ids)
        return Batch(
            torch.from_numpy(tokens), torch.from_numpy(targets), document_ids, lambda: _spans(content, time)
        )

    # -- what it comes to ----------------------------------------------------------------------------------------------

    def use(self) -> list[Use]:
        """Tokens and passes over each component, phase by phase."""
        out = []
        for index, phase in enumerate(self.mixture.phases):
            for component, drawn in zip(self.components[index], self._drawn(index, phase.steps), strict=True):
                tokens = drawn * self.mixture.sequence_length
                out.append(
                    Use(
                        phase.name,
                        component.source.name,
                        component.language,
                        tokens,
                        drawn / component.packing.rows_in_epoch(),
                    )
                )
        return out

    def _warn_of_repeats(self) -> None:
        passes: dict[tuple[str, str], float] = {}
        limits: dict[tuple[str, str], tuple[float, str]] = {}
        for index, phase in enumerate(self.mixture.phases):
            for component, drawn in zip(self.components[index], self._drawn(index, phase.steps), strict=True):
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
                f"these documents are repeated: {', '.join(over)}; add text, lower their share, or raise max_epochs",
                KoineWarning,
                stacklevel=3,
            )

    def _warn_of_cut_documents(self, packings: dict[tuple[str, str], StreamPacking | WholePacking]) -> None:
        counts = [packing.cut_off() for packing in packings.values() if isinstance(packing, WholePacking)]
        cut, total = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        if cut:
            warnings.warn(
                f"{cut} of {total} documents are longer than a sequence of {self.mixture.sequence_length} tokens and lose their end "
                "(a chat its answer); raise the sequence length, or leave them out",
                KoineWarning,
                stacklevel=3,
            )


def _refuse_twice(phase: str, components: list[Component]) -> None:
    """Two sources of a phase that read the same documents would draw the same rows."""
    seen: dict[tuple[str, str], str] = {}
    for component in components:
        other = seen.setdefault(component.key, component.source.name)
        if other != component.source.name:
            raise UserError(
                f"the sources '{other}' and '{component.source.name}' both draw '{component.language}' from {component.source.path}",
                where=f"phase '{phase}'",
                mend="give each language of a folder to one of them",
            )


def _fill(
    component: Component,
    pieces: list[Pieces],
    tokens: NDArray[Any],
    targets: NDArray[Any],
    ids: NDArray[Any],
    *,
    cross: bool,
) -> None:
    """Write one row; the position before a stretch's end has its target in the stretch or, for the last one, beyond the row."""
    time = len(tokens)
    column = 0
    for number, (document, start, end) in enumerate(pieces):
        # A stretch may reach one token beyond the row: the last position's target.
        stretch = component.tokens.tokens(document, start, end)
        width = min(end - start, time - column)
        if width <= 0:
            if cross and column == time:
                targets[-1] = stretch[0] if _counts_as_target(component, document, start) else NO_TARGET
            break
        tokens[column : column + width] = stretch[:width]
        ids[column : column + width] = number
        follow = stretch[1 : width + 1].astype(np.int64)
        if component.tokens.chat:
            mask = component.tokens.mask(document, start, end)[1 : width + 1]
            follow = np.where(mask > 0, follow, NO_TARGET)
        targets[column : column + len(follow)] = follow
        if cross and column > 0 and _counts_as_target(component, document, start):
            targets[column - 1] = stretch[0]
        column += width


def _counts_as_target(component: Component, document: int, position: int) -> bool:
    if not component.tokens.chat:
        return True
    return bool(component.tokens.mask(document, position, position + 1)[0])


def _spans(content: list[tuple[Component, list[Pieces]]], time: int) -> list[list[Span]]:
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


def _apportion(weights: NDArray[Any], total: int) -> NDArray[Any]:
    """Whole numbers that sum to `total`, in proportion to `weights` (largest remainder), at least 1 each."""
    if len(weights) > total:
        raise UserError(f"{len(weights)} languages in one mixture", mend=f"at most {total} are possible")
    exact = weights / weights.sum() * (total - len(weights))
    counts = np.floor(exact).astype(np.int64)
    missing = total - len(weights) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    out: NDArray[Any] = counts + 1
    return out


def _stable_number(text: str) -> int:
    """A number that depends on the text alone (Python's own hash changes from process to process)."""
    return int.from_bytes(text.encode("utf-8")[:8].ljust(8, b"\0"), "big")


class _Recent(OrderedDict[Any, T]):
    """The few values computed last."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def get(self, key: Any, compute: Callable[[], T]) -> T:  # type: ignore[override]
        if key in self:
            self.move_to_end(key)
        else:
            self[key] = compute()
            if len(self) > self._size:
                self.popitem(last=False)
        value: T = self[key]
        return value
