"""Record the documents that trainings have drawn, so that the next one draws fresh ones.

A place is a number of documents in a shuffle, and a shuffle follows from the mixture's seed and the language:
a training with the same seed begins after the documents that the models it starts from have seen, whatever
its rows and shares are; with another seed the documents come in another order. `training.json` says it of a
trained model, and `drawn.json` of one that was made of others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import read_json, write_json

FILE = "drawn.json"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Count of documents drawn of one language of a token source, in one shuffle."""

    source: str
    """sha256 of the manifest: a folder may be moved."""
    language: str
    shuffle: tuple[int, ...]
    """Seed of the shuffle (`DataOrder.drawn`)."""
    documents: int
    """Documents that were begun, epoch after epoch."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shuffle", tuple(self.shuffle))
        if any(type(part) is not int or part < 0 for part in self.shuffle):
            raise UserError(f"the shuffle of '{self.language}' is {list(self.shuffle)}", hint="train again")
        if type(self.documents) is not int or self.documents < 0:
            raise UserError(f"{self.documents} documents of '{self.language}'", hint="train again")

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """Key that is equal for trainings that draw the same documents in the same order."""
        return self.source, self.language, self.shuffle

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal one."""
        return {**dataclasses.asdict(self), "shuffle": list(self.shuffle)}


def from_json(value: Any, *, where: Path) -> list[Drawn]:
    """Places from their JSON values. Raises `UserError` where a value is none."""
    names = {field.name for field in dataclasses.fields(Drawn)}
    if not isinstance(value, list) or any(not isinstance(one, dict) or one.keys() != names for one in value):
        raise UserError("what was drawn is not a list of places", where=where, hint="train again")
    texts = all(isinstance(one[name], str) for one in value for name in ("source", "language"))
    if not texts or any(not isinstance(one["shuffle"], list) for one in value):
        raise UserError("what was drawn is not a list of places", where=where, hint="train again")
    return [Drawn(**one) for one in value]


def merge_drawn(parts: Iterable[Iterable[Drawn]]) -> tuple[Drawn, ...]:
    """Join the places of several models: of equal ones the furthest.

    A document that one of them has seen is not fresh for their mix.
    """
    found: dict[Any, Drawn] = {}
    for part in parts:
        for one in part:
            known = found.setdefault(one.key, one)
            if one.documents > known.documents:
                found[one.key] = one
    return tuple(found[key] for key in sorted(found))


def read_drawn(model: Path) -> tuple[Drawn, ...]:
    """Read the places of a model and of those that it was made of; none where none are recorded."""
    found: list[list[Drawn]] = []
    for path in (model / "training.json", model / FILE):
        if path.is_file():
            content = read_json(path)
            value = content.get("drawn", []) if isinstance(content, dict) else None
            found.append(from_json(value, where=path))
    return merge_drawn(found)


def carry_drawn(models: Iterable[Path], out: Path) -> None:
    """Write into `out`, which was made of `models`, what they have drawn; no file where nothing is known."""
    drawn = merge_drawn(read_drawn(model) for model in models)
    if drawn:
        write_json(out / FILE, {"drawn": [one.to_json() for one in drawn]})
