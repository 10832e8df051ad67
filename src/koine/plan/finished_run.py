"""A run that has succeeded, as the closings of its plan see it: time, stages, commands to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.files import read_json
from koine.plan.command_line import shell_command, shown_path
from koine.plan.formatting import duration, hanging


@dataclass(frozen=True)
class Stage:
    """Steps with one purpose.

    seconds: sum over the steps, also of those that were built by an earlier run.
    """

    names: tuple[str, ...]
    purpose: str
    seconds: float

    @property
    def label(self) -> str:
        """The steps' name, or what their names begin with."""
        first = dict.fromkeys(name.partition("/")[0] for name in self.names)
        name = self.names[0] if len(self.names) == 1 else ", ".join(first)
        return name if len(self.names) == 1 else f"{name} ×{len(self.names)}"


@dataclass(frozen=True)
class FinishedRun:
    """A run that has succeeded.

    folder: the run's folder. seconds: how long this run took. nodes: as in `plan.json`, in the plan's order.
    """

    folder: Path
    seconds: float
    nodes: tuple[Mapping[str, Any], ...]

    def command(self, *words: str | Path) -> str:
        """Return a `koine` command that works in the user's shell, such as `.venv/bin/koine chat runs/x/model`.

        words: after `koine`; a `Path` is shown relative to the working directory where it lies below it.
        """
        return shell_command(*words)

    def path(self, path: Path) -> str:
        """Return a path as the user would type it."""
        return shown_path(path)

    def total(self) -> str:
        """Return one line: what the run did, and its total time."""
        counts = {
            status: sum(node["status"] == status for node in self.nodes)
            for status in ("built", "reused", "adopted", "not needed")
        }
        done = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        built = sum(node["seconds"] or 0.0 for node in self.nodes)
        return f"total time: {duration(self.seconds)} ({done}" + (
            ")" if counts["built"] else f"; when they were built, the steps took {duration(built)})"
        )

    def stages(self) -> list[Stage]:
        """Return the steps grouped by purpose, in the plan's order."""
        groups: dict[str, list[Mapping[str, Any]]] = {}
        for node in self.nodes:
            if node["status"] != "not needed":
                groups.setdefault(node["purpose"] or node["name"], []).append(node)
        return [
            Stage(
                tuple(node["name"] for node in nodes), purpose, sum(node["seconds"] or 0.0 for node in nodes)
            )
            for purpose, nodes in groups.items()
        ]

    def stage_lines(self) -> list[str]:
        """Return a line for each stage: steps, their seconds in all, what they were for."""
        stages = self.stages()
        labels = max(len(stage.label) for stage in stages)
        times = max(len(duration(stage.seconds)) for stage in stages)
        return [
            line
            for stage in stages
            for line in hanging(
                f"  {stage.label:<{labels}}  {duration(stage.seconds):>{times}}  ", stage.purpose
            )
        ]


def read_verdict(artifact: Path) -> tuple[str, str] | None:
    """Return question and answer of the verdict in an artifact's `report.json`; None where it has none."""
    report = artifact / "report.json"
    blocks: Sequence[Mapping[str, Any]] = read_json(report)["blocks"] if report.exists() else []
    for block in blocks:
        if block["kind"] == "verdict":
            return str(block.get("title", "")), str(block["text"])
    return None
