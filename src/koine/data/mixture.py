"""Data mixtures: named sources in proportions, phase after phase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from koine.data.drawn import Drawn
from koine.errors import UserError
from koine.fields import check_boolean, check_choice, check_integer, check_number, check_text, short_repr
from koine.languages import language

Packing = Literal["concat", "no_split", "one_per_row"]
_PACKING_BEFORE = {"stream": "concat", "whole": "no_split", "alone": "one_per_row"}
"""Names of the packings before version 0.1.0; read, never written."""
MOST_TOKENS = 2**28
"""Most tokens of a step: several times those of the largest published trainings."""
MOST_STEPS = 2**36


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of token shards and its share of a phase's sequences."""

    name: str
    path: Path
    proportion: float
    """Share of the phase's tokens; the proportions of a phase must sum to 1."""
    languages: Mapping[str, float] | None = None
    """Weights of the languages to draw from; others are left out. `None`: all, by `temperature`."""
    temperature: float | None = None
    """Languages are weighted by `tokens ** (1 / temperature)`; 1 is natural, infinity uniform."""
    min_tokens: int | None = None
    """Fewest tokens of a document that is drawn; `None`: all."""
    max_epochs: float = 4.0
    """More epochs than this over a language's documents give a `KoineWarning`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        where = f"source {short_repr(self.name)}"
        check_text("name", self.name, where=where)
        check_number("proportion", self.proportion, above=0, high=1, where=where)
        if self.languages is not None and self.temperature is not None:
            raise UserError(
                "has both language weights and a temperature", where=where, hint="give one of them"
            )
        # Infinity is allowed: all languages weigh the same, or no limit of epochs.
        if self.temperature is not None and self.temperature != math.inf:
            check_number("temperature", self.temperature, above=0, where=where)
        if self.max_epochs != math.inf:
            check_number("max_epochs", self.max_epochs, above=0, where=where)
        if self.min_tokens is not None:
            check_integer("min_tokens", self.min_tokens, low=1, where=where)
        if self.languages is not None:
            if not isinstance(self.languages, Mapping):
                raise UserError(
                    f"languages is {short_repr(self.languages)}",
                    where=where,
                    hint="it must be an object of weights by language code",
                )
            if not self.languages:
                raise UserError("names no language", where=where)
            weights: dict[str, float] = {}
            for given, weight in self.languages.items():
                code = language(given).code
                if code in weights:
                    raise UserError(f"two weights for '{code}'", where=where, hint="give one")
                weights[code] = check_number(
                    f"the weight of '{code}'", weight, above=0, high=1e12, where=where
                )
            object.__setattr__(self, "languages", weights)


class Shape(NamedTuple):
    """Tokens of a row, and rows of a step over all ranks."""

    sequence_length: int
    batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequence_length * self.batch_size


class StepPosition(NamedTuple):
    """Position of a step in a mixture."""

    phase: int
    inside: int
    """Number of the step inside its phase."""
    long: bool
    """Whether the step is a batch of long rows."""
    number: int
    """Steps of the same phase and kind (long or not) before it."""


@dataclass(frozen=True, kw_only=True)
class LongRows:
    """Batches of long rows in a phase: its steps `every - 1`, `2 * every - 1`, ... (counted from 0)."""

    every: int
    sequence_length: int
    batch_size: int
    sources: tuple[Source, ...] = ()
    """Sources of the long rows, with their own proportions; empty: the phase's sources."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        # A phase with only long rows has a sequence_length of its own instead.
        check_integer("every", self.every, low=2, where="long rows")
        _check_shape(self.sequence_length, self.batch_size, "long rows")
        if self.sources:
            _check_sources(self.sources, "long rows")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one mixture; learning-rate schedules start anew with each phase."""

    name: str
    steps: int
    sources: tuple[Source, ...]
    sequence_length: int | None = None
    """Tokens of a row in this phase; `None`: the mixture's."""
    batch_size: int | None = None
    """Rows of a step in this phase; `None`: the mixture's."""
    long: LongRows | None = None
    """Batches of long rows among the others; `None`: none."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        where = f"phase {short_repr(self.name)}"
        check_text("name", self.name, where=where)
        check_integer("steps", self.steps, low=1, high=MOST_STEPS, where=where)
        _check_sources(self.sources, where)
        _check_shape(self.sequence_length, self.batch_size, where)
        if self.long is None:
            return
        if self.long.every > self.steps:
            raise UserError(
                f"has {self.steps} steps, and every {self.long.every}th is one of long rows",
                where=where,
                hint="give it more steps, or long rows more often",
            )
        paths = {source.name: source.path for source in self.sources}
        for source in self.long.sources:
            if paths.get(source.name, source.path) != source.path:
                raise UserError(
                    f"'{source.name}' is one folder for long rows and another for the others",
                    where=where,
                    hint="give the two sources two names",
                )

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """Sources of all rows, long or not; one that serves both is listed twice."""
        return self.sources + (self.long.sources if self.long is not None else ())


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Everything that the data order depends on.

    `sequence_length` and `batch_size` hold for every phase that has none of its own.

    `packing` says how documents fill rows:

    - `"concat"`: documents are shuffled, joined and cut every `sequence_length` tokens;
    - `"no_split"`: a row holds whole documents; only a document longer than the row is truncated;
    - `"one_per_row"`: one document a row, truncated if longer; the rest of the row is padding.

    With `cross_document_attention`, attention and targets cross the boundary of two documents in a row.
    """

    phases: tuple[Phase, ...]
    sequence_length: int
    batch_size: int
    seed: int = 0
    packing: Packing = "concat"
    cross_document_attention: bool = False
    drawn: tuple[Drawn, ...] = ()
    """Documents drawn by earlier trainings (`koine.data.drawn`); the first phase continues after them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        object.__setattr__(self, "drawn", tuple(self.drawn))
        if not self.phases:
            raise UserError("the mixture has no phases")
        _check_shape(self.sequence_length, self.batch_size, None)
        for phase in self.phases:
            rows = phase.sequence_length or self.sequence_length
            if phase.long is not None and phase.long.sequence_length <= rows:
                raise UserError(
                    f"its long rows have {phase.long.sequence_length} tokens, the others {rows}",
                    where=f"phase '{phase.name}'",
                    hint="long rows must be longer",
                )
        for shape in self.shapes():
            if shape.tokens > MOST_TOKENS:
                raise UserError(
                    f"a step has {shape.tokens:,} tokens",
                    hint=f"{MOST_TOKENS:,} are possible: give it fewer rows",
                )
        check_integer("seed", self.seed, low=0, high=2**63 - 1)
        object.__setattr__(
            self, "packing", check_choice("packing", current_packing(self.packing), get_args(Packing))
        )
        check_boolean("cross_document_attention", self.cross_document_attention)

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def position(self, step: int) -> StepPosition:
        """Return phase and position of a step. Raises `UserError` outside the mixture."""
        if not 0 <= step < self.steps:
            raise UserError(
                f"step {step} is outside the mixture", hint=f"it has the steps 0 to {self.steps - 1}"
            )
        index, inside = 0, step
        while inside >= self.phases[index].steps:
            inside -= self.phases[index].steps
            index += 1
        every = self.long_every(index)
        before = inside // every if every else 0
        if every and (inside + 1) % every == 0:
            return StepPosition(index, inside, True, before)
        return StepPosition(index, inside, False, inside - before)

    def long_every(self, phase: int) -> int:
        """Return `every` of a phase's long rows; 0 if it has none."""
        long = self.phases[phase].long
        return long.every if long is not None else 0

    def phase_shape(self, phase: int, *, long: bool) -> Shape:
        """Return the shape of a phase's long rows, or of its other rows."""
        one = self.phases[phase]
        if long:
            assert one.long is not None
            return Shape(one.long.sequence_length, one.long.batch_size)
        return Shape(one.sequence_length or self.sequence_length, one.batch_size or self.batch_size)

    def shape(self, step: int) -> Shape:
        """Return the shape of a step."""
        place = self.position(step)
        return self.phase_shape(place.phase, long=place.long)

    def phase_steps(self, phase: int, *, long: bool) -> int:
        """Count the steps of long rows, or of the others, in a phase."""
        every, steps = self.long_every(phase), self.phases[phase].steps
        of_long = steps // every if every else 0
        return of_long if long else steps - of_long

    def shapes(self) -> dict[Shape, int]:
        """Return every shape, and the number of steps that have it."""
        found: dict[Shape, int] = {}
        for index, phase in enumerate(self.phases):
            for long in (False, True) if phase.long is not None else (False,):
                shape = self.phase_shape(index, long=long)
                found[shape] = found.get(shape, 0) + self.phase_steps(index, long=long)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `from_json` makes an equal mixture."""
        from koine.data.mixture_json import mixture_to_json

        return mixture_to_json(self)

    @staticmethod
    def from_json(value: Any, *, where: str | Path = "mixture", relative_to: Path | None = None) -> Mixture:
        """Read a mixture from its JSON value; relative paths are taken from `relative_to`.

        Raises `UserError` for unknown keys (with the nearest known one), missing ones, and values of a wrong
        type or out of bounds.
        """
        from koine.data.mixture_json import mixture_from_json

        return mixture_from_json(value, where=where, relative_to=relative_to)


def current_packing(name: Any) -> Any:
    """Return today's name of a packing for a name of an earlier version; anything else as it is."""
    return _PACKING_BEFORE.get(name, name) if isinstance(name, str) else name


def _check_shape(sequence_length: int | None, batch_size: int | None, where: str | None) -> None:
    if sequence_length is not None:
        check_integer("sequence_length", sequence_length, low=2, high=MOST_TOKENS, where=where)
    if batch_size is not None:
        check_integer("batch_size", batch_size, low=1, high=MOST_TOKENS, where=where)


def _check_sources(sources: tuple[Source, ...], where: str) -> None:
    if not sources:
        raise UserError("has no sources", where=where)
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"two sources share a name ({', '.join(names)})", where=where)
    total = sum(source.proportion for source in sources)
    if abs(total - 1.0) > 1e-6:
        raise UserError(
            f"the proportions sum to {total:g}, not 1",
            where=where,
            hint=f"they are {', '.join(f'{s.name} {s.proportion:g}' for s in sources)}",
        )
