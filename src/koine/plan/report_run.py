"""A run folder, read for its report: the artifacts, how they hang together, the curves of the trainings."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.files import read_json
from koine.plan.report_blocks import StepReport, is_number, read_step_report


@dataclass(frozen=True)
class Parent:
    """What an artifact was made from, as it was recorded when the artifact was made."""

    name: str
    inside: str
    fingerprint: str


@dataclass(frozen=True)
class Member:
    """One artifact of a run."""

    name: str
    record: dict[str, Any]
    parents: tuple[Parent, ...]
    report: StepReport | None
    curves: dict[str, tuple[list[float], list[float]]]  # metric -> (steps, values)

    @property
    def step(self) -> str:
        """The step's function, without its module; `adopted` where no step made it."""
        step = self.record.get("step")
        return step.rpartition(":")[2].rpartition(".")[2] if isinstance(step, str) and step else "adopted"

    @property
    def fingerprint(self) -> str:
        return str(self.record.get("fingerprint") or "")

    @property
    def metrics(self) -> dict[str, Any]:
        metrics = self.record.get("metrics")
        return metrics if isinstance(metrics, dict) else {}

    def number(self, key: str) -> float | None:
        """A number of the record, `None` where there is none."""
        value = self.record.get(key)
        return float(value) if is_number(value) else None


def read_run(run: Path) -> list[Member]:
    """The artifacts of the run folder `run`, parents before children, equals by name.

    Raises `UserError` where `run` is no run folder, holds no finished artifact, or a file in it is broken.
    """
    if not run.is_dir():
        beside = [item.name for item in run.parent.iterdir() if item.is_dir()] if run.parent.is_dir() else []
        raise UserError(
            "no such run folder",
            where=run,
            mend=did_you_mean(run.name, beside) if beside else "build one with koine run PLAN",
        )
    folders = list(artifact_folders(run))
    if not folders:
        started = any((run / name).exists() for name in (".work", "logs", "plan.json"))
        raise UserError(
            "no artifact is finished yet" if started else "not a run folder: it holds no artifact",
            where=run,
            mend="finish it with koine run PLAN"
            if started
            else "give the folder that koine run wrote, runs/NAME",
        )
    if run in folders:
        raise UserError(
            "an artifact, not a run folder", where=run, mend=f"give the run it is in, such as {run.parent}"
        )
    return in_order([read_member(run, folder) for folder in folders])


def artifact_folders(folder: Path) -> Iterator[Path]:
    """Every folder below `folder` with an artifact.json, by name; hidden folders and links elsewhere are left alone."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "artifact.json" in files:
            yield Path(place)
            folders.clear()


def read_member(run: Path, folder: Path) -> Member:
    record = read_json(folder / "artifact.json")
    if not isinstance(record, dict):
        raise UserError(
            "not an artifact's record",
            where=folder / "artifact.json",
            mend="remove the folder and run the plan again",
        )
    report, metrics = folder / "report.json", folder / "metrics.jsonl"
    return Member(
        name=folder.relative_to(run).as_posix(),
        record=record,
        parents=tuple(dict.fromkeys(parents_in(record.get("inputs"), record.get("parents")))),
        report=read_step_report(report) if report.exists() else None,
        curves=read_curves(metrics) if metrics.exists() else {},
    )


def parents_in(*values: Any) -> Iterator[Parent]:
    """Every recorded handle (`{"artifact" or "name": ..., "fingerprint": ...}`) in nested lists and dicts."""
    for value in values:
        if isinstance(value, dict):
            name = value.get("artifact", value.get("name"))
            if isinstance(name, str) and isinstance(value.get("fingerprint"), str):
                yield Parent(name, str(value.get("inside") or ""), value["fingerprint"])
            else:
                yield from parents_in(*value.values())
        elif isinstance(value, list):
            yield from parents_in(*value)


def read_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each metric in a `metrics.jsonl`; values that are no finite number are gaps."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                step = entry["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number} is not a JSON object with a step",
                    where=path,
                    mend="run the training again",
                ) from None
            for key, value in entry.items():
                if key != "step" and is_number(value):
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(float(step))
                    values.append(float(value))
    return curves


def in_order(members: list[Member]) -> list[Member]:
    """Parents before children; among those that are free, the order of names."""
    names = {member.name for member in members}
    waiting = {member.name: member for member in sorted(members, key=lambda member: member.name)}
    done: list[Member] = []
    while waiting:
        free = [
            member
            for member in waiting.values()
            if not any(parent.name in waiting and parent.name in names for parent in member.parents)
        ]
        # A circle cannot come from a plan; should a record be edited by hand, the rest follows by name.
        for member in free or list(waiting.values()):
            done.append(waiting.pop(member.name))
    return done
