"""Text of `koine run --dry-run`, and of the table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from koine.hardware import available_memory, free_disk_bytes, usable_cores
from koine.plan.formatting import duration, size, table
from koine.plan.plan import Node, Plan
from koine.plan.run.checks import check_memory, check_room, check_run_folder, check_steps
from koine.plan.run.estimates import Expectation, critical_path, expect, makespan
from koine.plan.store.status import Status, statuses


def examine(plan: Plan) -> tuple[dict[str, Status], dict[str, Node], Expectation]:
    """Return the status of each artifact, the steps that would run, and what they are expected to need.

    Raises `UserError` for a mistake that is known before anything runs, and warns as the run itself would. A
    disk without room is a warning here: the plan may be for another machine.
    """
    check_run_folder(plan.folder)
    found = statuses(plan)
    build = {name: plan.nodes[name] for name, status in found.items() if status.state == "build"}
    expectation = expect(plan, build, check_steps(plan, found))
    check_room(plan, expectation, refuse=False)
    check_memory(expectation, available_memory())
    return found, build, expectation


def dry_run_lines(plan: Plan) -> list[str]:
    """Return a table of artifacts with state, reasons, memory and time; then totals and critical path.

    Errors and warnings are those of `examine`.
    """
    found, build, expectation = examine(plan)
    rows = [("artifact", "would be", "peak memory", "time", "why")]
    for name, status in found.items():
        estimate = expectation.steps.get(name)
        memory, time = ("", "") if name not in build else ("?", "?")
        if estimate is not None:
            memory, time = size(estimate.memory_bytes), duration(estimate.seconds)
        state = "built" if status.state == "build" else status.state
        rows.append((name, state, memory, time, "; ".join(status.reasons)))
    return [*table(rows), "", *totals(plan, expectation, len(build))]


def dry_run_figures(plan: Plan) -> dict[str, Any]:
    """Return the dry run as JSON values: bytes and seconds, None where there is no estimate.

    Errors and warnings are those of `examine`.
    """
    found, build, expectation = examine(plan)
    cores = usable_cores()
    seconds = {name: estimate.seconds for name, estimate in expectation.steps.items()}
    path, shortest = critical_path(plan, seconds)
    artifacts = []
    for name, status in found.items():
        estimate = expectation.steps.get(name)
        artifacts.append(
            {
                "artifact": name,
                "state": status.state,
                "reasons": status.reasons,
                "peak_memory_bytes": None if estimate is None else estimate.memory_bytes,
                "seconds": None if estimate is None else estimate.seconds,
                "disk_bytes": None if estimate is None else estimate.disk_bytes,
            }
        )
    return {
        "artifacts": artifacts,
        "steps_to_run": len(build),
        "without_estimate": expectation.unknown,
        "seconds": expectation.seconds,
        "critical_path": path,
        "critical_path_seconds": shortest,
        "cores": cores,
        "seconds_on_this_machine": None
        if expectation.unknown
        else makespan(plan, expectation, cores=cores, free_memory=available_memory()),
        "peak_memory_bytes": expectation.memory_bytes,
        "disk_bytes": expectation.disk_bytes,
        "free_disk_bytes": free_disk_bytes(plan.folder),
        "bases": expectation.bases,
    }


def totals(plan: Plan, expectation: Expectation, count: int) -> list[str]:
    """Return the sums over the steps that would run, and their critical path."""
    if not count:
        return ["Nothing to do: all artifacts are up to date."]
    lines = [f"{count} of {len(plan.nodes)} steps would run."]
    if expectation.steps:
        cores = usable_cores()
        whole = makespan(plan, expectation, cores=cores, free_memory=available_memory())
        path, seconds = critical_path(
            plan, {name: estimate.seconds for name, estimate in expectation.steps.items()}
        )
        lines += [
            f"Time: {duration(expectation.seconds)} one after another; "
            f"at least {duration(seconds)} side by side: " + " → ".join(path),
            f"Peak memory: {size(expectation.memory_bytes)} in the largest step.",
        ]
        if not expectation.unknown:
            lines.insert(2, f"On this machine ({cores} cores): about {duration(whole)}.")
        if expectation.disk_bytes:
            free = free_disk_bytes(plan.folder)
            lines.append(
                f"Disk: about {size(expectation.disk_bytes)} to write, {size(free)} free in {plan.runs}."
            )
        lines += expectation.bases
    if expectation.unknown:
        lines.append(f"No estimate for: {', '.join(expectation.unknown)}.")
    return lines


def run_summary(nodes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the table at the end of a run, from the nodes of its record."""
    rows = [("artifact", "", "seconds", "peak memory")]
    for name, node in nodes.items():
        seconds, memory = node["seconds"], node["peak_memory_bytes"]
        rows.append(
            (
                name,
                str(node["status"]),
                "" if seconds is None else f"{seconds:.1f}",
                "" if memory is None else size(memory),
            )
        )
    return table(rows)
