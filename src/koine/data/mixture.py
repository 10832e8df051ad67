"""What is trained on: named sources in proportions, phase after phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from koine.errors import UserError, did_you_mean
from koine.languages import language

Packing = Literal["stream", "whole"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder of token shards and its share of a phase's sequences."""

    name: str
    path: Path
    proportion: float
    """Share of the phase's tokens; the shares of a phase must sum to 1."""
    languages: Mapping[str, float] | None = None
    """Weights of the languages to draw from; languages not named are left out. `None`: all, by `temperature`."""
    temperature: float | None = None
    """Languages are weighted by `tokens ** (1 / temperature)`; 1 is their natural share, infinity uniform."""
    max_epochs: float = 4.0
    """More passes than this over a language's documents raise a `KoineWarning`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if not 0.0 < self.proportion <= 1.0:
            raise UserError(
                f"the proportion {self.proportion} is not above 0 and at most 1",
                where=f"source '{self.name}'",
            )
        if self.languages is not None and self.temperature is not None:
            raise UserError(
                "has both language weights and a temperature",
                where=f"source '{self.name}'",
                mend="give one of them",
            )
        if self.temperature is not None and not self.temperature > 0.0:
            raise UserError(
                f"the temperature {self.temperature} is not above 0", where=f"source '{self.name}'"
            )
        if not self.max_epochs > 0.0:
            raise UserError(f"max_epochs is {self.max_epochs}, not above 0", where=f"source '{self.name}'")
        if self.languages is not None:
            if not self.languages:
                raise UserError("names no language", where=f"source '{self.name}'")
            weights = {language(code).code: float(weight) for code, weight in self.languages.items()}
            for code, weight in weights.items():
                if not weight > 0.0 or weight == float("inf"):
                    raise UserError(
                        f"the weight {weight} of '{code}' is not a number above 0",
                        where=f"source '{self.name}'",
                    )
            object.__setattr__(self, "languages", weights)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one mixture; learning-rate schedules begin again with each."""

    name: str
    steps: int
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        where = f"phase '{self.name}'"
        if self.steps < 1:
            raise UserError(f"has {self.steps} steps", where=where, mend="it needs at least 1")
        if not self.sources:
            raise UserError("has no sources", where=where)
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"two sources share a name ({', '.join(names)})", where=where)
        total = sum(source.proportion for source in self.sources)
        if abs(total - 1.0) > 1e-6:
            raise UserError(
                f"the proportions sum to {total:g}, not 1",
                where=where,
                mend=f"they are {', '.join(f'{s.name} {s.proportion:g}' for s in self.sources)}",
            )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Everything that the data order depends on.

    `packing` `"stream"`: documents are shuffled, joined and cut every `sequence_length` tokens. `"whole"`: a row holds whole documents,
    and only one longer than the row is cut off. With `cross_document_attention`, attention and targets run on across the
    boundary of two documents; without, neither does.
    """

    phases: tuple[Phase, ...]
    sequence_length: int
    batch_size: int
    seed: int = 0
    packing: Packing = "stream"
    cross_document_attention: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise UserError("the mixture has no phases")
        if self.sequence_length < 2:
            raise UserError(f"sequence_length is {self.sequence_length}", mend="it must be at least 2")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}", mend="it must be at least 1")
        if self.seed < 0:
            raise UserError(f"the seed is {self.seed}", mend="it must not be negative")
        if self.packing not in get_args(Packing):
            raise UserError(
                f"unknown packing '{self.packing}'", mend=did_you_mean(self.packing, get_args(Packing))
            )

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal mixture."""
        value = dataclasses.asdict(self)
        for phase in value["phases"]:
            # Absolute, so that a model's record of its data can be read from any folder.
            phase["sources"] = [
                {**source, "path": str(source["path"].resolve())} for source in phase["sources"]
            ]
        value["phases"] = list(value["phases"])
        return value

    @staticmethod
    def from_json(value: Any, *, where: str | Path = "mixture", relative_to: Path | None = None) -> Mixture:
        """A mixture from its JSON value; paths that are not absolute are taken from `relative_to`.

        Raises `UserError` for unknown keys (with the nearest known one), missing ones, and impossible values.
        """

        def source(item: Any) -> Source:
            fields = _fields(Source, item, where)
            path = Path(fields["path"])
            fields["path"] = path if relative_to is None else relative_to / path
            return Source(**fields)

        def phase(item: Any) -> Phase:
            fields = _fields(Phase, item, where)
            return Phase(
                **{**fields, "sources": tuple(source(one) for one in _list(fields["sources"], where))}
            )

        fields = _fields(Mixture, value, where)
        try:
            return Mixture(
                **{**fields, "phases": tuple(phase(one) for one in _list(fields["phases"], where))}
            )
        except TypeError as error:
            raise UserError(f"a value has the wrong type ({error})", where=where) from None


def _list(value: Any, where: str | Path) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"expected a list, found {type(value).__name__}", where=where)
    return value


def _fields(kind: type[Any], value: Any, where: str | Path) -> dict[str, Any]:
    """The fields of a JSON object, checked against a dataclass."""
    if not isinstance(value, dict):
        raise UserError(f"expected an object with the fields of a {kind.__name__.lower()}", where=where)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in known:
            raise UserError(
                f"unknown key '{key}' of a {kind.__name__.lower()}",
                where=where,
                mend=did_you_mean(key, known),
            )
    for name, field in known.items():
        if name not in value and field.default is dataclasses.MISSING:
            raise UserError(f"a {kind.__name__.lower()} lacks '{name}'", where=where)
    return dict(value)
