"""`koine run`, `koine adopt`, `koine lineage`: run plans, register artifacts, trace their origin."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from koine.cli.outputs import OutputFolder
from koine.errors import UserError, did_you_mean
from koine.terminal import printable

if TYPE_CHECKING:
    from koine.plan import Plan
    from koine.plan.run.scheduler import Executor, PlanFailedError

EXECUTORS = ("local", "ray")
RUNS = click.option(
    "--runs",
    type=OutputFolder(),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)


def check_executor(name: str, address: str | None) -> None:
    """Raise `UserError` for an unknown executor, and for an address without Ray."""
    if name not in EXECUTORS:
        raise UserError(f"unknown executor '{name}'", where="--executor", hint=did_you_mean(name, EXECUTORS))
    if address is not None and name != "ray":
        raise UserError("an address is for Ray only", where="--address", hint="add --executor ray")


def executor_of(name: str, address: str | None) -> Executor:
    """Return the executor of that name."""
    if name == "ray":
        from koine.plan.run.ray import RayExecutor

        return RayExecutor(address)
    from koine.plan.run.local import LocalExecutor

    return LocalExecutor()


def write_report(plan: Plan) -> None:
    """Write the run's report if the run has a finished artifact."""
    if any((plan.folder / name / "artifact.json").exists() for name in plan.nodes):
        from koine.plan.report.page import write_report as write

        click.echo(f"report: {write(plan.folder)}")


@click.command()
@click.argument("plan", required=False)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a parameter of the plan; repeatable."
)
@RUNS
@click.option("--name", default=None, help="Name of the run, and of its folder.  [default: the plan's name]")
@click.option(
    "--threads",
    type=int,
    default=None,
    help="CPU cores of each step that trains or evaluates.  [default: the plan's choice, 1 or 2]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show which steps would run and why, with expected memory and time; run nothing.",
)
@click.option(
    "--list-parameters",
    "only_list",
    is_flag=True,
    help="List the plan's parameters: default, unit, allowed values, description.",
)
@click.option("--executor", default="local", show_default=True, metavar="local|ray", help="Where steps run.")
@click.option(
    "--address", default=None, help="Address of the Ray cluster.  [default: start one on this machine]"
)
def run(
    plan: str | None,
    settings: tuple[str, ...],
    runs: Path,
    name: str | None,
    threads: int | None,
    dry_run: bool,
    only_list: bool,
    executor: str,
    address: str | None,
) -> None:
    """Run PLAN, the name of a recipe or path/to/file.py:function; without PLAN, list the recipes.

    Steps that are missing or changed are run, the others are reused.
    """
    from koine.plan.command_line import shell_command
    from koine.plan.finished_run import FinishedRun
    from koine.plan.loading import make_plan
    from koine.plan.parameters import parameter_table, parse_settings
    from koine.plan.run.dry_run import dry_run_lines, run_summary
    from koine.plan.run.scheduler import PlanFailedError, RunInterruptedError, execute
    from koine.recipes.table import find_plan, recipe_list

    check_executor(executor, address)
    if plan is None:
        click.echo(
            "\n".join(
                [
                    *recipe_list(),
                    "",
                    f"Run one: {shell_command('run')} NAME. "
                    f"Its settings: {shell_command('run')} NAME --list-parameters",
                ]
            )
        )
        return
    function = find_plan(plan)
    if only_list:
        click.echo("\n".join(parameter_table(function)))
        return
    values = parse_settings(function, settings)
    made = make_plan(function, values, name=name, runs=runs, threads=threads)
    if not made.nodes:
        raise UserError(
            "the plan has no steps", where=plan, hint="add some with plan.step(function, name=..., ...)"
        )
    if dry_run:
        click.echo("\n".join(dry_run_lines(made)))
        return
    begun = time.monotonic()
    try:
        nodes = execute(made, executor=executor_of(executor, address))
    except RunInterruptedError as error:
        click.echo(f"koine: {error}", err=True)
        sys.exit(error.exit_code)
    except PlanFailedError as error:
        show_failures(error)
        write_report(made)
        sys.exit(error.exit_code)
    finished = FinishedRun(made.folder, time.monotonic() - begun, tuple(nodes.values()))
    click.echo("\n".join(["", *run_summary(nodes), "", finished.total()]))
    if (
        any(node["status"] == "built" for node in nodes.values())
        or not (made.folder / "report.html").exists()
    ):
        write_report(made)
    for text in made.closing_texts(finished):
        click.echo(printable(text))


def show_failures(error: PlanFailedError) -> None:
    """Print one line for each failed step, after the last lines of the log of one that crashed."""
    for failure in error.failures:
        if failure.code != 2:
            click.echo("".join(f"  | {line}\n" for line in failure.lines), err=True, nl=False)
        click.echo(f"koine: {failure.message}", err=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", "run_name", required=True, help="Name of the run.")
@click.option("--name", required=True, help="Name of the artifact in the plan.")
@RUNS
def adopt(folder: Path, run_name: str, name: str, runs: Path) -> None:
    """Copy FOLDER into a run as an artifact; the plan then never runs the step of that name."""
    from koine.plan.store.adopt import adopt_folder

    click.echo(f"adopted: {adopt_folder(folder, name=name, run=run_name, runs=runs)}")


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the tree as JSON.")
@click.option("--verify", is_flag=True, help="Read every file again and compare its sha256 with the record.")
def lineage(artifact: Path, as_json: bool, verify: bool) -> None:
    """Print what the folder ARTIFACT was made from, back to the inputs, with hashes and metrics."""
    from koine.plan.store.lineage import all_ancestors, trace_lineage, tree_lines

    node = trace_lineage(artifact, verify=verify)
    text = (
        json.dumps(node.to_json(), ensure_ascii=False, indent=2) if as_json else "\n".join(tree_lines(node))
    )
    click.echo(text)
    if verify:
        wrong = [f"{one.path}: {problem}" for one in all_ancestors(node) for problem in one.problems]
        if wrong:
            raise UserError(
                "; ".join(wrong), hint="remove the folder and run the plan again to have it rebuilt"
            )
        if not as_json:
            click.echo("verified: every file matches its record")
