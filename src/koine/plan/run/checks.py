"""Checks before a run: the steps' own, the run's folder, free disk and memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koine.errors import KoineWarning, UserError
from koine.hardware import free_disk_bytes
from koine.plan.formatting import size
from koine.plan.plan import Artifact, Node, Plan
from koine.plan.run.estimates import Expectation
from koine.plan.step import PlannedInput
from koine.plan.store.status import Status

DISK_RESERVE = 1.2
"""Free disk below this multiple of what a run will write is worth a warning."""


def check_steps(plan: Plan, found: Mapping[str, Status]) -> dict[str, dict[str, Any]]:
    """Call the check of each step that will run; return each such step's inputs as `PlannedInput`s.

    Raises `UserError` for the first mistake, with the plan's parameter at fault where that is known.
    """
    ready = {name for name, status in found.items() if status.state in ("reused", "adopted")}
    facts: dict[str, Any] = {}
    planned: dict[str, dict[str, Any]] = {}
    for name, node in plan.nodes.items():
        if found[name].state != "build":
            continue
        planned[name] = {
            key: planned_inputs(value, {*ready, *plan.inputs}, facts) for key, value in node.inputs.items()
        }
        if node.info.check is not None:
            facts[name] = call_check(plan, node, planned[name])
    return planned


def call_check(plan: Plan, node: Node, inputs: Mapping[str, Any]) -> Any:
    """Return the result of a step's check; its error names the plan's parameter, or else the step."""
    assert node.info.check is not None
    try:
        return node.info.check(**inputs, **node.parameters)
    except UserError as error:
        where = error.where
        if where is None or (is_artifact(plan, where) and not Path(where).exists()):
            where = f"step '{node.artifact.name}'"
        raise plan.naming_parameter(UserError(error.what, where=where, hint=error.hint)) from None


def is_artifact(plan: Plan, where: str) -> bool:
    """Return whether a place lies in the run's folder."""
    return Path(where).is_relative_to(plan.folder.resolve())


def planned_inputs(value: Any, ready: set[str], facts: Mapping[str, Any]) -> Any:
    """Return an input with every handle replaced by a `PlannedInput`.

    ready: names of the artifacts and inputs that are there and stay. facts: what is known of the others.
    """
    if isinstance(value, Artifact):
        known = None if value.inside else facts.get(value.name)
        return PlannedInput(value.place, value.name in ready, known)
    if isinstance(value, dict):
        return {key: planned_inputs(item, ready, facts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [planned_inputs(item, ready, facts) for item in value]
    return value


def check_run_folder(folder: Path) -> None:
    """Raise `UserError` where the run's folder cannot be made or written."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        what = (
            "a link that leads nowhere" if place.is_symlink() else "a file, and the run needs a folder here"
        )
        raise UserError(what, where=place, hint="choose another --runs or --name, or move it away")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            "cannot be written", where=place, hint="choose another --runs, or change its permissions"
        )


def check_room(plan: Plan, expectation: Expectation, *, refuse: bool = True) -> None:
    """Warn where the disk is tight for the run; raise `UserError` where it has too little room.

    Without `refuse` that is a warning too.
    """
    needed, free = expectation.disk_bytes, free_disk_bytes(plan.folder)
    if not needed:
        return
    sizes = {name: one.disk_bytes + one.temporary_bytes for name, one in expectation.steps.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    text = (
        f"the run will write about {size(needed)} ({size(sizes[largest])} of it for {largest}), "
        f"and {size(free)} are free"
    )
    hint = "free some, or choose a folder on another disk with --runs"
    if needed > free and refuse:
        raise UserError(text, where=plan.folder, hint=hint)
    if needed * DISK_RESERVE > free:
        warnings.warn(f"{plan.folder}: {text}; {hint}", KoineWarning, stacklevel=2)


def check_memory(expectation: Expectation, free: int | None) -> None:
    """Warn of a step that may need more memory than is free; None: that is not known."""
    for name, estimate in expectation.steps.items():
        if free is not None and estimate.memory_bytes > free:
            warnings.warn(
                f"step '{name}' may need {size(estimate.memory_bytes)} of memory, and {size(free)} are free",
                KoineWarning,
                stacklevel=2,
            )
