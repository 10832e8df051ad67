"""Files of a monitor: figures and samples of each evaluation, the same after a kill and a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import parse_json, write_atomically

# Names that begin with `metrics`, so that they are not carried into models that are made of this one.
TABLE, SAMPLES = "metrics-behaviour.jsonl", "metrics-samples.jsonl"


def append_lines(path: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Append lines of a step as JSON; lines of this step and later ones, and a cut one, are removed first."""
    kept = b"".join(raw for raw, _ in _lines_before(path, step))
    new = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, kept + new.encode())


def _lines_before(path: Path, step: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of steps before `step`, as bytes and as JSON."""
    if not path.exists():
        return
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = parse_json(raw.decode())
            if not raw.endswith(b"\n") or int(line["step"]) >= step:
                return
        except (ValueError, KeyError, TypeError):
            return
        yield raw, line


def flat(overall: Mapping[str, float], languages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the figures overall by name, then those of each language as `NAME/CODE`."""
    return {
        **overall,
        **{f"{name}/{code}": value for code, own in languages.items() for name, value in own.items()},
    }


def evaluations_before(folder: Path, step: int) -> list[dict[str, float]]:
    """Return the flat figures of each evaluation in a folder before a step, with `step`."""
    return [
        {"step": line["step"], **flat(line["overall"], line["languages"])}
        for _, line in _lines_before(folder / TABLE, step)
    ]


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics-behaviour.jsonl` or `metrics-samples.jsonl`.

    Raises `UserError` where it is missing.
    """
    if not path.exists():
        raise UserError("no such file", where=path, hint="give the folder of a training with a monitor")
    return [line for _, line in _lines_before(path, 2**62)]
