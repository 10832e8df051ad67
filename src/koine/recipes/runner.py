"""Run a plan from Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from koine.plan.loading import make_plan
from koine.recipes.table import find_plan

if TYPE_CHECKING:
    from koine.plan.run.scheduler import Executor


@dataclass(frozen=True)
class PlanResult:
    """A finished run: its folder, and the folder of each artifact by name.

    `status` says of each artifact what the run did: `built`, `reused`, `adopted` or `not needed`.
    """

    folder: Path
    artifacts: dict[str, Path]
    status: dict[str, str]


def run_plan(
    plan: str | Callable[..., None],
    *,
    out: str | Path | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    **parameters: Any,
) -> PlanResult:
    """Run a plan: build what is missing or changed, reuse the rest, and write the report.

    It does the same as `koine run`, in the same folders. For example:

        from koine.recipes import run_plan

        result = run_plan("quickstart", out="runs/first", preset="koine-0.5m", pretrain_steps=100)
        print(result.artifacts["model"])

    Args:
        plan: a recipe's name, `path/to/file.py:function`, or a plan function of an importable module.
        out: folder of the run; `runs/NAME` by default.
        threads: CPU cores of each step that trains or evaluates; the plan's own choice by default.
        executor: where steps run; processes of this machine by default.
        parameters: the plan's parameters by name, as `koine run NAME --list-parameters` lists them.

    Raises:
        UserError: a parameter is unknown or out of its bounds, an input is missing, and the like.
        PlanFailedError: steps failed; everything that succeeded stays.
        RunInterruptedError: the run was interrupted; the same call continues it.
    """
    from koine.plan.report.page import write_report
    from koine.plan.run.scheduler import execute

    function = find_plan(plan) if isinstance(plan, str) else plan
    folder = Path("runs") / function.__name__ if out is None else Path(out)
    made = make_plan(function, parameters, name=folder.name, runs=folder.parent, threads=threads)
    nodes = execute(made, executor=executor)
    if made.nodes:
        write_report(made.folder)
    return PlanResult(
        made.folder,
        {name: node.artifact.path for name, node in made.nodes.items()},
        {name: str(node["status"]) for name, node in nodes.items()},
    )
