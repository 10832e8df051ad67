"""Read and write mixtures as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from koine.data.drawn import from_json as read_drawn_entries
from koine.data.mixture import LongRows, Mixture, Phase, Source, current_packing
from koine.errors import UserError
from koine.fields import Fields, check_text, short_repr

T = TypeVar("T", Source, LongRows, Phase, Mixture)


def mixture_to_json(mixture: Mixture) -> dict[str, Any]:
    """Return a JSON value from which `mixture_from_json` makes an equal mixture."""
    value = dataclasses.asdict(mixture)
    phases = []
    for phase in value["phases"]:
        phase["sources"] = [_source_to_json(one) for one in phase["sources"]]
        if phase["long"] is not None:
            phase["long"]["sources"] = [_source_to_json(one) for one in phase["long"]["sources"]]
        # Unset fields are left out, so that the JSON of older mixtures stays the same.
        phases.append({name: entry for name, entry in phase.items() if entry is not None})
    drawn = [one.to_json() for one in mixture.drawn]
    del value["drawn"]
    return {**value, "phases": phases, **({"drawn": drawn} if drawn else {})}


def _source_to_json(source: Mapping[str, Any]) -> dict[str, Any]:
    # The path is absolute, so that a model's training.json can be read from any folder.
    return {
        name: str(entry.resolve()) if name == "path" else entry
        for name, entry in source.items()
        if name != "min_tokens" or entry is not None
    }


def mixture_from_json(value: Any, *, where: str | Path, relative_to: Path | None) -> Mixture:
    """Read a mixture from its JSON value; relative paths are taken from `relative_to`.

    Raises `UserError` for unknown keys (with the nearest known one), missing ones, and values of a wrong type
    or out of bounds.
    """
    fields = _fields(Mixture, value, str(where))
    phases = fields.entries("phases")
    return _built(
        Mixture,
        fields,
        phases=tuple(_phase(one, str(where), relative_to) for one in phases),
        drawn=tuple(read_drawn_entries(fields.entries("drawn", []), where=Path(where))),
    )


def _phase(value: Any, file: str, relative_to: Path | None) -> Phase:
    fields = _fields(Phase, value, f"{file}: {_label('phase', value)}")
    changes: dict[str, Any] = {
        "sources": tuple(_source(one, file, relative_to) for one in fields.entries("sources"))
    }
    if (long := fields.inner("long", None)) is not None:
        rows = _fields(LongRows, long.value, f"{fields.where}: long rows")
        sources = tuple(_source(one, file, relative_to) for one in rows.entries("sources", []))
        changes["long"] = _built(LongRows, rows, str(fields.where), sources=sources)
    return _built(Phase, fields, file, **changes)


def _source(value: Any, file: str, relative_to: Path | None) -> Source:
    fields = _fields(Source, value, f"{file}: {_label('source', value)}")
    path = Path(check_text("path", fields.get("path"), where=fields.where))
    return _built(Source, fields, file, path=path if relative_to is None else relative_to / path)


def _label(kind: str, value: Any) -> str:
    """Return how errors name a phase or a source, before its name is checked."""
    name = value.get("name") if isinstance(value, dict) else None
    return f"a {kind}" if name is None else f"{kind} {short_repr(name)}"


def _fields(kind: type[Any], value: Any, where: str) -> Fields:
    """Return the fields of a JSON object. Raises `UserError` for keys that `kind` lacks, and missing ones."""
    known = dataclasses.fields(kind)
    needed = [field.name for field in known if field.default is dataclasses.MISSING]
    fields = Fields(value, where, hint_if_broken=f"it needs {', '.join(needed)}")
    fields.check_known([field.name for field in known])
    for name in needed:
        fields.get(name)
    return fields


def _built(kind: type[T], fields: Fields, file: str | None = None, **changes: Any) -> T:
    """Build a dataclass, which checks its values; its errors name the file."""
    given = {name: entry for name, entry in fields.value.items() if entry is not None}
    try:
        return kind(**{**given, **changes})
    except UserError as error:
        place = fields.where if file is None else file
        where = place if error.where is None else f"{place}: {error.where}"
        raise UserError(error.what, where=where, hint=error.hint) from None


def with_current_names(recorded: Any) -> Any:
    """Return a recorded mixture (JSON) with today's names, to compare it with a mixture of today."""
    if not isinstance(recorded, dict) or "packing" not in recorded:
        return recorded
    return {**recorded, "packing": current_packing(recorded["packing"])}
