"""Record the documents that trainings have drawn, so that the next one draws fresh ones.

A record is a number of documents in a shuffle, and a shuffle follows from the mixture's seed and the
language. A training with the same seed begins after the documents that its initial models have seen, whatever
its rows and proportions. With another seed the documents come in another order. The record is in
`training.json` of a trained model, and in `drawn.json` of a model that was made of others.
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
        """Return a JSON value from which `from_json` makes an equal record."""
        return {**dataclasses.asdict(self), "shuffle": list(self.shuffle)}


def from_json(value: Any, *, where: Path) -> list[Drawn]:
    """Read records from their JSON values. Raises `UserError` for any other value."""
    names = {field.name for field in dataclasses.fields(Drawn)}
    if not isinstance(value, list) or any(not isinstance(one, dict) or one.keys() != names for one in value):
        raise UserError("what was drawn is not a list of places", where=where, hint="train again")
    texts = all(isinstance(one[name], str) for one in value for name in ("source", "language"))
    if not texts or any(not isinstance(one["shuffle"], list) for one in value):
        raise UserError("what was drawn is not a list of places", where=where, hint="train again")
    return [Drawn(**one) for one in value]


def merge_drawn(parts: Iterable[Iterable[Drawn]]) -> tuple[Drawn, ...]:
    """Join the records of several models; of records with the same key, keep the furthest.

    A document that one of the models has seen is not fresh for their mix.
    """
    found: dict[Any, Drawn] = {}
    for part in parts:
        for one in part:
            known = found.setdefault(one.key, one)
            if one.documents > known.documents:
                found[one.key] = one
    return tuple(found[key] for key in sorted(found))


def read_drawn(model: Path) -> tuple[Drawn, ...]:
    """Read the records of a model and of the models it was made of; empty if there are none."""
    found: list[list[Drawn]] = []
    for path in (model / "training.json", model / FILE):
        if path.is_file():
            content = read_json(path)
            value = content.get("drawn", []) if isinstance(content, dict) else None
            found.append(from_json(value, where=path))
    return merge_drawn(found)


def carry_drawn(models: Iterable[Path], out: Path) -> None:
    """Write the joined records of `models` into `out`, which was made of them; no file if there are none."""
    drawn = merge_drawn(read_drawn(model) for model in models)
    if drawn:
        write_json(out / FILE, {"drawn": [one.to_json() for one in drawn]})
