"""Record what a command makes: the `artifact.json` of its output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from koine.files.stand_ins import sources_of
from koine.plan.command_line import recorded_command
from koine.plan.store.recording import Parents, recorded

NOT_OF_THE_RESULT = (
    "out", "overwrite", "dry_run", "threads", "workers", "device", "track", "track_project", "quiet", "as_json",
)  # fmt: skip
"""Parameters of commands that do not change what they write."""


@contextmanager
def recorded_output(
    out: Path, parents: Parents, *, metrics: Callable[[Path], Mapping[str, Any]] | None = None
) -> Iterator[None]:
    """Have the folder `out`, which the current command makes in this context, get its `artifact.json`.

    Step and parameters are those of the command, as click has parsed them; see `koine.plan.store.recording`.
    Of the processes of a distributed training only the first one writes it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    context = click.get_current_context()
    parameters = {
        name: _plain(value) for name, value in context.params.items() if name not in NOT_OF_THE_RESULT
    }
    with recorded(out, step=context.command_path, parents=parents, parameters=parameters, metrics=metrics):
        yield


def _plain(value: Any) -> Any:
    """Return a parameter as a JSON value; keys and passwords in addresses are hidden."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if (sources := sources_of(value)) is not None:
        # A merge for this command only: the record names base and adapter.
        return "+".join(_plain(source) for source in sources)
    return recorded_command([str(value)])[0]
