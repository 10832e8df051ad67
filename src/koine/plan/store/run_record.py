"""Write `plan.json` in a run's folder: the graph, the state of each step, the command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from koine.files import write_json
from koine.plan.command_line import recorded_command
from koine.plan.plan import Plan
from koine.plan.run.estimates import Expectation
from koine.plan.store.publish import record_of
from koine.plan.store.status import Status


class RunRecord:
    """The record of a run, written again whenever a step changes its state.

    Each of `nodes` has `name`, `step`, `version`, `purpose`, `parents`, `fingerprint`, `status`, `reasons`,
    `seconds`, `peak_memory_bytes`, `estimate`, `parameters`, `log` (relative to the run's folder). `status` is
    `waiting`, `running`, `built`, `reused`, `adopted`, `not needed`, `failed`, `not run` (an input failed)
    or `interrupted`.
    """

    def __init__(self, plan: Plan, statuses: dict[str, Status], expectation: Expectation) -> None:
        self.folder = plan.folder
        self.nodes: dict[str, dict[str, Any]] = {}
        for name, node in plan.nodes.items():
            status = statuses[name]
            log = Path("logs") / f"{name}.log"
            self.nodes[name] = {
                "name": name,
                "step": node.identity["step"],
                "version": node.identity["version"],
                "purpose": node.purpose,
                "parents": list(node.parents),
                "fingerprint": node.artifact.fingerprint,
                "status": "waiting" if status.state == "build" else status.state,
                "reasons": list(status.reasons),
                "seconds": None,
                "peak_memory_bytes": None,
                "estimate": expectation.record(name),
                "parameters": node.identity["parameters"],
                "log": log.as_posix() if (plan.folder / log).exists() or status.state == "build" else None,
            }
            self.copy_measures(name)
        self.content: dict[str, Any] = {
            "run": plan.name,
            "argv": recorded_command(),
            "started": time.time(),
            "finished": None,
            "status": "running",
            "inputs": {
                name: {"path": str(artifact.path), "fingerprint": artifact.fingerprint}
                for name, artifact in plan.inputs.items()
            },
            "exports": {
                to: f"{artifact.name}/{artifact.inside}".rstrip("/") for to, artifact in plan.exports.items()
            },
            "nodes": list(self.nodes.values()),
        }

    def copy_measures(self, name: str) -> None:
        """Copy time and memory from the artifact's own record."""
        known = record_of(self.folder / name)
        if known is not None:
            for key in ("seconds", "peak_memory_bytes"):
                self.nodes[name][key] = known.get(key)

    def set(self, name: str, status: str) -> None:
        """Set the state of a step."""
        self.nodes[name]["status"] = status
        if status in ("built", "reused"):
            self.copy_measures(name)
        self.write()

    def end(self, status: str) -> None:
        """Set the state of the whole run: `succeeded`, `failed` or `interrupted`."""
        for node in self.nodes.values():
            if node["status"] in ("waiting", "running"):
                node["status"] = "interrupted" if node["status"] == "running" else "not run"
        self.content |= {"finished": time.time(), "status": status}
        self.write()

    def write(self) -> None:
        """Write the record."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "plan.json", self.content)
