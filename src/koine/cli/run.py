"""`koine run`, `koine adopt`, `koine lineage`: run plans, register artifacts, trace their origin."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from koine.cli.answers import print_answer
from koine.cli.arguments import RECIPE, Suggested
from koine.cli.commands import Command
from koine.cli.outputs import OutputFolder
from koine.errors import UserError, did_you_mean
from koine.terminal import is_quiet, note, printable

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


def write_report(plan: Plan) -> Path | None:
    """Write the run's report if the run has a finished artifact; return its page."""
    if any((plan.folder / name / "artifact.json").exists() for name in plan.nodes):
        from koine.plan.report.page import write_report as write

        return write(plan.folder)
    return None


@click.command(cls=Command)
@click.argument("plan", type=RECIPE, required=False)
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
@click.option(
    "--executor",
    type=Suggested(lambda: dict.fromkeys(EXECUTORS, "")),
    default="local",
    show_default=True,
    metavar="local|ray",
    help="Where steps run.",
)
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
    from koine.plan.loading import make_plan
    from koine.plan.parameters import parameter_table, parameters_of, parse_settings
    from koine.plan.run.dry_run import dry_run_figures, dry_run_lines
    from koine.plan.run.scheduler import PlanFailedError, RunInterruptedError, execute
    from koine.recipes.table import RECIPES, find_plan, recipe_list

    check_executor(executor, address)
    if plan is None:
        command = shell_command("run")
        usage = f"Run one: {command} NAME. Its settings: {command} NAME --list-parameters"
        recipes = [{"recipe": name, "summary": one.summary} for name, one in RECIPES.items()]
        print_answer({"recipes": recipes}, lambda: click.echo("\n".join([*recipe_list(), "", usage])))
        return
    function = find_plan(plan)
    if only_list:
        declared = [one.to_json() for one in parameters_of(function)]
        print_answer(
            {"plan": plan, "parameters": declared}, lambda: click.echo("\n".join(parameter_table(function)))
        )
        return
    values = parse_settings(function, settings)
    made = make_plan(function, values, name=name, runs=runs, threads=threads)
    if not made.nodes:
        raise UserError(
            "the plan has no steps", where=plan, hint="add some with plan.step(function, name=..., ...)"
        )
    if dry_run:
        print_answer(dry_run_figures(made), lambda: click.echo("\n".join(dry_run_lines(made))))
        return
    begun = time.monotonic()
    try:
        nodes = execute(made, executor=executor_of(executor, address))
    except RunInterruptedError as error:
        click.echo(f"koine: {error}", err=True)
        sys.exit(error.exit_code)
    except PlanFailedError as error:
        show_failures(error)
        if (page := write_report(made)) is not None:
            note(f"report: {page}")
        failures = [
            {"artifact": one.name, "exit_code": one.code, "log": one.log, "message": one.message}
            for one in error.failures
        ]
        print_answer({"run": made.folder, "failures": failures, "report": page}, lambda: None)
        sys.exit(error.exit_code)
    print_outcome(made, nodes, seconds=time.monotonic() - begun)


def print_outcome(plan: Plan, nodes: Mapping[str, Mapping[str, Any]], *, seconds: float) -> None:
    """Print the table of a complete run's artifacts, and what its plan says at the end.

    The report is written first where something is new. Under `--quiet`, table and verdicts are the answer.
    """
    from koine.plan.finished_run import FinishedRun
    from koine.plan.run.dry_run import run_summary

    finished = FinishedRun(plan.folder, seconds, tuple(nodes.values()))
    page: Path | None = plan.folder / "report.html"
    is_new = any(node["status"] == "built" for node in nodes.values()) or not (page and page.exists())
    if is_new:
        page = write_report(plan)
    texts, verdicts = plan.closing_texts(finished), finished.verdicts()

    def show() -> None:
        note("")  # between the progress and the table
        click.echo("\n".join(run_summary(nodes)))
        note(f"\n{finished.total()}")
        if is_quiet():
            for one in verdicts:
                click.echo(printable(f"{one.question} {one.answer}"))
        if is_new and page is not None and not any(finished.path(page) in text for text in texts):
            note(f"report: {finished.path(page)}")
        for text in texts:
            note(text)

    artifacts = [
        {"artifact": name, **{key: node[key] for key in ("status", "seconds", "peak_memory_bytes")}}
        for name, node in nodes.items()
    ]
    answer = {
        "run": plan.folder,
        "seconds": seconds,
        "artifacts": artifacts,
        "stages": finished.stages(),
        "verdicts": verdicts,
        "report": page,
        "notes": [line for text in texts for line in text.strip("\n").split("\n")],
    }
    print_answer(answer, show)


def show_failures(error: PlanFailedError) -> None:
    """Print one line for each failed step, after the last lines of the log of one that crashed."""
    for failure in error.failures:
        if failure.code != 2:
            click.echo("".join(f"  | {line}\n" for line in failure.lines), err=True, nl=False)
        click.echo(f"koine: {failure.message}", err=True)


@click.command(cls=Command)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", "run_name", required=True, help="Name of the run.")
@click.option("--name", required=True, help="Name of the artifact in the plan.")
@RUNS
def adopt(folder: Path, run_name: str, name: str, runs: Path) -> None:
    """Copy FOLDER into a run as an artifact; the plan then never runs the step of that name."""
    from koine.plan.store.adopt import adopt_folder

    adopted = adopt_folder(folder, name=name, run=run_name, runs=runs)
    print_answer({"written": adopted}, lambda: note(f"adopted: {adopted}"))


@click.command(cls=Command)
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--verify", is_flag=True, help="Read every file again and compare its sha256 with the record.")
def lineage(artifact: Path, verify: bool) -> None:
    """Print what the folder ARTIFACT was made from, back to the inputs, with hashes and metrics."""
    from koine.plan.store.lineage import all_ancestors, trace_lineage, tree_lines

    node = trace_lineage(artifact, verify=verify)
    print_answer(node.to_json(), lambda: click.echo("\n".join(tree_lines(node))))
    if verify:
        wrong = [f"{one.path}: {problem}" for one in all_ancestors(node) for problem in one.problems]
        if wrong:
            raise UserError(
                "; ".join(wrong), hint="remove the folder, and run the plan or command again that made it"
            )
        note("verified: every file matches its record")
