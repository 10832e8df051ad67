"""Estimates of a plan: of each step by its own formula, corrected by earlier builds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean, median
from typing import Any

from koine.errors import UserError
from koine.plan.plan import Node, Plan, places
from koine.plan.step import Estimate
from koine.plan.store.publish import record_of

START_SECONDS = 0.4
"""Time to start the process of a step, and to publish what it wrote."""


@dataclass(frozen=True)
class Expectation:
    """Estimates of the steps that will run; `unknown` names those without formula and earlier build."""

    steps: dict[str, Estimate]
    unknown: tuple[str, ...] = ()
    formulas: dict[str, Estimate] = field(default_factory=dict)  # before the scaling by earlier builds

    @property
    def seconds(self) -> float:
        """Seconds of all steps, one after another."""
        return sum(estimate.seconds for estimate in self.steps.values())

    def record(self, name: str) -> dict[str, Any] | None:
        """Return a step's estimate for the record of its artifact; None where there is none."""
        if name not in self.steps:
            return None
        formula = self.formulas.get(name)
        return {
            "memory_bytes": self.steps[name].memory_bytes,
            "seconds": self.steps[name].seconds,
            "formula_seconds": None if formula is None else formula.seconds,
            "disk_bytes": self.steps[name].disk_bytes,
            "measured": self.steps[name].measured,
        }

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk of all artifacts, and of the largest step's temporary files."""
        temporary = max((estimate.temporary_bytes for estimate in self.steps.values()), default=0)
        return sum(estimate.disk_bytes for estimate in self.steps.values()) + temporary

    @property
    def bases(self) -> list[str]:
        """Return the sources of the steps' times, each sentence once."""
        return list(dict.fromkeys(one.basis for one in self.steps.values() if one.basis))

    @property
    def memory_bytes(self) -> int:
        """Peak memory of the largest step, in bytes."""
        return max((estimate.memory_bytes for estimate in self.steps.values()), default=0)


def history(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Return the records of the artifacts in the run's folder, by the step that built them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for node in plan.nodes.values():
        known = record_of(node.artifact.path)
        # The seconds of a resumed build are those of its last attempt only.
        # Records written while the clock was set back have negative ones.
        if known is not None and known.get("attempts") == 1 and known["seconds"] >= 0:
            found.setdefault(known["step"], []).append(known)
    return found


def formula(plan: Plan, node: Node, planned: Mapping[str, Any] | None = None) -> Estimate | None:
    """Return the result of the step's own `estimate` for its arguments; None where it has none.

    planned: the step's inputs as its check gets them.
    """
    if node.info.estimate is None:
        return None
    arguments = {key: places(value) for key, value in node.inputs.items()} | node.parameters
    takes = inspect.signature(node.info.estimate).parameters
    if "planned" in takes:
        arguments["planned"] = planned or {}
    if "threads" in takes:
        arguments.setdefault("threads", plan.threads_of(node.artifact.name))
    given = node.info.estimate(**arguments)
    if not isinstance(given, Estimate) or min(figures(given)) < 0:
        raise UserError(
            f"its estimate must return an Estimate of memory and time, got {given!r}",
            where=node.identity["step"],
        )
    return given


def figures(estimate: Estimate) -> tuple[float, ...]:
    """Return the numbers of an estimate, none of which may be negative."""
    return estimate.memory_bytes, estimate.seconds, estimate.disk_bytes, estimate.temporary_bytes


def scaled(node: Node, given: Estimate | None, records: list[dict[str, Any]]) -> Estimate | None:
    """Return the formula's estimate, its time scaled by the median of actual over estimated time.

    Only earlier estimates of the same kind count: a measured speed says nothing about an assumed one.
    Without a formula: the figures of an earlier build of this artifact, or else the mean over the same step's
    others.
    """
    if given is None:
        same = [known for known in records if known.get("artifact") == node.artifact.name] or records
        if not same:
            return None
        return Estimate(
            max(int(known["peak_memory_bytes"]) for known in same),
            fmean(known["seconds"] for known in same),
            max(sum(known.get("bytes", {}).values()) for known in same),
        )
    ratios = [
        known["seconds"] / known["estimate"]["formula_seconds"]
        for known in records
        if known.get("estimate")
        and known["estimate"]["formula_seconds"]
        and known["estimate"].get("measured") == given.measured
    ]
    return replace(given, seconds=given.seconds * (median(ratios) if ratios else 1.0))


def expect(
    plan: Plan, build: Mapping[str, Node], planned: Mapping[str, Mapping[str, Any]] | None = None
) -> Expectation:
    """Return estimates for the steps that will run.

    planned: each step's inputs as its check gets them.
    """
    past, inputs = history(plan), planned or {}
    formulas = {name: formula(plan, node, inputs.get(name)) for name, node in build.items()}
    found = {
        name: scaled(node, formulas[name], past.get(node.identity["step"], []))
        for name, node in build.items()
    }
    return Expectation(
        {name: estimate for name, estimate in found.items() if estimate is not None},
        tuple(name for name, estimate in found.items() if estimate is None),
        {name: estimate for name, estimate in formulas.items() if estimate is not None},
    )


def remaining(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """Return for each artifact the time of the longest chain of steps that starts with it."""
    found = {name: seconds.get(name, 0.0) for name in plan.nodes}
    for name, node in reversed(plan.nodes.items()):
        for parent in node.parents:
            if parent in found:
                found[parent] = max(found[parent], seconds.get(parent, 0.0) + found[name])
    return found


def critical_path(plan: Plan, seconds: Mapping[str, float]) -> tuple[list[str], float]:
    """Return the chain of steps that takes longest, and its time: a bound for any number of machines.

    `seconds` holds the steps that will run; the others take no time.
    """
    ends: dict[str, tuple[float, list[str]]] = {}
    for name, node in plan.nodes.items():
        before, path = max((ends[parent] for parent in node.parents if parent in ends), default=(0.0, []))
        own = [name] if name in seconds else []
        ends[name] = (before + seconds.get(name, 0.0), path + own)
    time, path = max(ends.values(), default=(0.0, []))
    return path, time


def makespan(plan: Plan, expectation: Expectation, *, cores: int, free_memory: int | None) -> float:
    """Return the seconds until the last step ends, with as many side by side as cores and memory allow.

    Steps start in the order of the scheduler: those with the longest remaining chain first.
    """
    seconds = {name: one.seconds + START_SECONDS for name, one in expectation.steps.items()}
    after = remaining(plan, seconds)
    waiting = sorted(seconds, key=lambda name: -after[name])
    running: dict[str, float] = {}
    now = 0.0

    def fits(name: str) -> bool:
        names = [*running, name]
        used = sum(min(plan.threads_of(one), cores) for one in names)
        memory = sum(expectation.steps[one].memory_bytes for one in names)
        return not running or (used <= cores and (free_memory is None or memory <= free_memory))

    while waiting or running:
        for name in list(waiting):
            parents = plan.nodes[name].parents
            if not any(one in waiting or one in running for one in parents) and fits(name):
                waiting.remove(name)
                running[name] = now + seconds[name]
        now = min(running.values())
        running = {name: end for name, end in running.items() if end > now}
    return now
