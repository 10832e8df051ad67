"""The answer of a command: text for people, or with `--json` one JSON object and nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import click

from koine.terminal import printable

_STREAM = "koine.cli.answers.stream"


@contextmanager
def json_answer(context: click.Context) -> Iterator[None]:
    """Reserve standard output for the answer; other output of the block goes to standard error."""
    context.meta[_STREAM] = sys.stdout
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        del context.meta[_STREAM]


def print_answer(answer: Mapping[str, Any], show: Callable[[], object]) -> None:
    """Print `answer` as JSON where the user gave `--json`; else call `show`, which prints it as text."""
    context = click.get_current_context(silent=True)
    stream: TextIO | None = None if context is None else context.meta.get(_STREAM)
    if stream is None:
        show()
        return
    stream.write(json_text(answer, ascii_only="utf" not in (stream.encoding or "utf-8").lower()) + "\n")
    stream.flush()


def json_text(answer: Any, *, ascii_only: bool = False) -> str:
    """Return a value as indented JSON, with numbers at full precision.

    NaN and infinity, which JSON does not have, are null. Control characters are escaped, so that a terminal
    does not execute them.
    """
    text = json.dumps(json_value(answer), ensure_ascii=ascii_only, allow_nan=False, indent=2)
    return "".join(one if one == "\n" or printable(one) == one else f"\\u{ord(one):04x}" for one in text)


def json_value(value: Any) -> Any:
    """Return a value made of kinds that JSON has: paths as text, dataclasses and named tuples as objects."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return json_value(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): json_value(one) for key, one in value.items()}
    if isinstance(value, Set):
        return sorted(map(json_value, value))
    if isinstance(value, Sequence):
        return [json_value(one) for one in value]
    if hasattr(value, "item"):  # a number of numpy or torch
        return json_value(value.item())
    raise TypeError(f"{type(value).__name__} has no form in JSON")
