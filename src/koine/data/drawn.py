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

from koine.fields import Fields, check_integer, short_repr
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
        where = f"drawn documents of {short_repr(self.language)}"
        object.__setattr__(self, "shuffle", tuple(self.shuffle))
        for part in self.shuffle:
            check_integer("shuffle", part, low=0, high=2**64 - 1, where=where)
        check_integer("documents", self.documents, low=0, where=where)

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """Key that is equal for trainings that draw the same documents in the same order."""
        return self.source, self.language, self.shuffle

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `from_json` makes an equal record."""
        return {**dataclasses.asdict(self), "shuffle": list(self.shuffle)}


def from_json(value: list[Any], *, where: Path) -> list[Drawn]:
    """Read records from a list of JSON values. Raises `UserError` for a value that is no record."""
    found = []
    for one in value:
        fields = Fields(one, f"{where}: drawn", hint_if_broken="train again")
        fields.check_known([field.name for field in dataclasses.fields(Drawn)])
        shuffle = tuple(
            check_integer("an entry of the field 'shuffle'", part, low=0, high=2**64 - 1, where=fields.where)
            for part in fields.entries("shuffle")
        )
        found.append(
            Drawn(
                source=fields.text("source"),
                language=fields.text("language"),
                shuffle=shuffle,
                documents=fields.integer("documents", low=0),
            )
        )
    return found


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
            fields = Fields(read_json(path), path, hint_if_broken="train again")
            found.append(from_json(fields.entries("drawn", []), where=path))
    return merge_drawn(found)


def carry_drawn(models: Iterable[Path], out: Path) -> None:
    """Write the joined records of `models` into `out`, which was made of them; no file if there are none."""
    drawn = merge_drawn(read_drawn(model) for model in models)
    if drawn:
        write_json(out / FILE, {"drawn": [one.to_json() for one in drawn]})
