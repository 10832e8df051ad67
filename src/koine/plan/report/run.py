"""Read a run folder for its report: artifacts, their parents, training curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError, nearest
from koine.files import parse_json, read_json
from koine.plan.report.blocks import StepReport, is_number, read_step_report

DONE = ("built", "reused", "adopted", "not needed")


@dataclass(frozen=True)
class Parent:
    """A parent of an artifact, as recorded when the artifact was built."""

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
        """The step's function, without its module."""
        return function_name(self.record.get("step"))

    @property
    def fingerprint(self) -> str:
        return str(self.record.get("fingerprint") or "")

    @property
    def metrics(self) -> dict[str, Any]:
        metrics = self.record.get("metrics")
        return metrics if isinstance(metrics, dict) else {}

    def number(self, key: str) -> float | None:
        """Return a number of the record; `None` where there is none."""
        value = self.record.get(key)
        return float(value) if value is not None and is_number(value) else None


@dataclass(frozen=True)
class Unfinished:
    """A step of the plan that has failed, or has not ended yet."""

    name: str
    step: str
    status: str
    parents: tuple[str, ...]
    log: str


@dataclass(frozen=True)
class Run:
    """The artifacts of a run, parents before children, and the unfinished steps of its `plan.json`."""

    members: tuple[Member, ...]
    unfinished: tuple[Unfinished, ...]
    former: frozenset[str]  # artifacts that the plan no longer has

    @property
    def order(self) -> list[str]:
        """All names, finished or not, parents before children."""
        parents = {node.name: node.parents for node in self.unfinished}
        parents |= {member.name: tuple(parent.name for parent in member.parents) for member in self.members}
        return in_order(parents)


def read_run(run: Path) -> Run:
    """Read the run folder `run`.

    Raises `UserError` where `run` is no run folder, holds no finished artifact, or a file in it is broken.
    """
    if not run.is_dir():
        raise UserError("no such run folder", where=run, hint=nearest_run(run))
    folders = list(artifact_folders(run))
    if run in folders:
        raise UserError(
            "an artifact, not a run folder", where=run, hint="give the folder of the run that it is in"
        )
    members = {member.name: member for folder in folders if (member := read_member(run, folder))}
    nodes = read_plan(run / "plan.json")
    if not members:
        raise UserError(
            "no artifact is finished yet" if nodes else "not a run folder: it holds no artifact",
            where=run,
            hint="finish it with koine run PLAN"
            if nodes
            else "give the folder that koine run wrote, runs/NAME",
        )
    unfinished = tuple(node for node in nodes.values() if node.status not in DONE)
    parents = {name: tuple(parent.name for parent in member.parents) for name, member in members.items()}
    listed = {name: parents[name] for name in [*nodes, *sorted(parents)] if name in parents}
    return Run(
        members=tuple(members[name] for name in in_order(listed)),
        unfinished=unfinished,
        former=frozenset(members.keys() - nodes.keys()) if nodes else frozenset(),
    )


def nearest_run(run: Path) -> str:
    """Return a hint for a missing folder: the closest names of runs beside it or in `runs/`."""
    known = {
        str(folder): folder.name
        for place in (run.parent, run.parent / "runs")
        if place.is_dir()
        for folder in place.iterdir()
        if (folder / "plan.json").is_file()
    }
    close = nearest(run.name, known.values(), 2)
    places = [repr(path) for path, name in known.items() if name in close]
    return f"did you mean {' or '.join(places)}?" if places else "build one with koine run PLAN"


def read_plan(path: Path) -> dict[str, Unfinished]:
    """Return the nodes of a `plan.json` in the plan's order; empty where there is no such file."""
    if not path.exists():
        return {}
    content = read_json(path)
    nodes = content.get("nodes") if isinstance(content, dict) else None
    if not isinstance(nodes, list) or not all(
        isinstance(node, dict) and isinstance(node.get("name"), str) for node in nodes
    ):
        raise UserError("not the record of a run", where=path, hint="run the plan again")
    return {
        node["name"]: Unfinished(
            node["name"],
            function_name(node.get("step")),
            str(node.get("status") or "unknown"),
            tuple(str(parent) for parent in node.get("parents") or ()),
            str(node.get("log") or ""),
        )
        for node in nodes
    }


def function_name(step: Any) -> str:
    """Return the function of `module:function`; `adopted` where no step is named."""
    return step.rpartition(":")[2].rpartition(".")[2] if isinstance(step, str) and step else "adopted"


def artifact_folders(folder: Path) -> Iterator[Path]:
    """Yield every folder below `folder` with an artifact.json, by name, also behind links.

    Hidden folders are skipped.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        about = place.stat()
        if (about.st_dev, about.st_ino) in seen:
            continue
        seen.add((about.st_dev, about.st_ino))
        if (place / "artifact.json").is_file():
            yield place
            continue
        below = [item for item in place.iterdir() if item.is_dir() and not item.name.startswith(".")]
        waiting += sorted(below, reverse=True)


def read_member(run: Path, folder: Path) -> Member | None:
    """Return one artifact; `None` for an exported copy of another one."""
    record = read_json(folder / "artifact.json")
    if not isinstance(record, dict):
        raise UserError(
            "not an artifact's record",
            where=folder / "artifact.json",
            hint="remove the folder and run the plan again",
        )
    name = folder.relative_to(run).as_posix()
    own = record.get("artifact", name)
    if own != name and isinstance(own, str) and (run / own / "artifact.json").exists():
        return None
    report, metrics = folder / "report.json", folder / "metrics.jsonl"
    return Member(
        name=name,
        record=record,
        parents=recorded_parents(record),
        report=read_step_report(report) if report.exists() else None,
        curves=read_curves(metrics) if metrics.exists() else {},
    )


def recorded_parents(record: dict[str, Any]) -> tuple[Parent, ...]:
    """Return the parents of an artifact, from its inputs and from its list of parents."""
    inputs = list(dict.fromkeys(parents_in(record.get("inputs"))))
    named = {parent.name for parent in inputs}
    return (*inputs, *(parent for parent in parents_in(record.get("parents")) if parent.name not in named))


def parents_in(*values: Any) -> Iterator[Parent]:
    """Yield every recorded handle (`{"artifact": ..., "fingerprint": ...}`) in nested lists and dicts."""
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
    """Return steps and values of each metric in a `metrics.jsonl`, without values that are not finite."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = parse_json(line)
                step = entry["step"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"line {number} is not a JSON object with a step",
                    where=path,
                    hint="run the training again",
                ) from None
            for key, value in entry.items():
                if key != "step" and is_number(value):
                    steps, values = curves.setdefault(key, ([], []))
                    steps.append(float(step))
                    values.append(float(value))
    return curves


def in_order(parents: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of `parents`, parents before children, otherwise in the given order."""
    done: dict[str, None] = {}
    waiting = dict(parents)
    while waiting:
        free = [name for name, above in waiting.items() if not any(parent in waiting for parent in above)]
        # A plan has no cycles. If a record edited by hand has one, the rest follows in the given order.
        for name in free or list(waiting):
            done[name] = None
            del waiting[name]
    return list(done)
