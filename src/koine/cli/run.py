"""`koine run`, `koine adopt`, `koine lineage`: build what is missing, take over what is there, ask where it is from."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from koine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from koine.plan import Plan
    from koine.plan.run.scheduler import Executor

EXECUTORS = ("local", "ray")
RUNS = click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Folder of all runs.",
)


def check_executor(name: str, address: str | None) -> None:
    """Raise `UserError` for an executor that does not exist, and an address that nobody would read."""
    if name not in EXECUTORS:
        raise UserError(f"unknown executor '{name}'", where="--executor", hint=did_you_mean(name, EXECUTORS))
    if address is not None and name != "ray":
        raise UserError("an address is for Ray only", where="--address", hint="add --executor ray")


def executor_of(name: str, address: str | None) -> Executor:
    """The executor that the user asked for."""
    if name == "ray":
        from koine.plan.run.ray import RayExecutor

        return RayExecutor(address)
    from koine.plan.run.local import LocalExecutor

    return LocalExecutor()


def list_parameters(function: Callable[..., None]) -> None:
    """Print what `--set` takes."""
    from koine.plan.formatting import table
    from koine.plan.parameters import MISSING, parameters_of

    rows = [("parameter", "type", "default")]
    for parameter in parameters_of(function):
        default = "(must be set)" if parameter.default is MISSING else str(parameter.default)
        rows.append((parameter.name, parameter.type_name, default))
    click.echo("\n".join(table(rows)))


def write_report(plan: Plan) -> None:
    """Write the run's report, where there is anything to report."""
    if any((plan.folder / name / "artifact.json").exists() for name in plan.nodes):
        from koine.plan.report.page import write_report as write

        click.echo(f"report: {write(plan.folder)}")


@click.command()
@click.argument("plan")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the plan; repeatable."
)
@RUNS
@click.option("--name", default=None, help="Name of the run.  [default: the plan's]")
@click.option(
    "--dry-run", is_flag=True, help="Show what would run and why, with memory and time; change nothing."
)
@click.option("--list-parameters", "only_list", is_flag=True, help="Show what --set takes.")
@click.option("--executor", default="local", show_default=True, metavar="local|ray", help="Where steps run.")
@click.option(
    "--address", default=None, help="Address of the Ray cluster.  [default: a new one on this machine]"
)
def run(
    plan: str,
    settings: tuple[str, ...],
    runs: Path,
    name: str | None,
    dry_run: bool,
    only_list: bool,
    executor: str,
    address: str | None,
) -> None:
    """Run PLAN: a recipe's name or path/to/file.py:function."""
    import koine.recipes
    from koine.plan import Plan
    from koine.plan.loading import find_plan
    from koine.plan.parameters import parse_settings
    from koine.plan.run import dry_run as words
    from koine.plan.run.scheduler import PlanFailedError, RunInterruptedError, execute

    check_executor(executor, address)
    function = find_plan(plan, koine.recipes)
    if only_list:
        list_parameters(function)
        return
    built = Plan(function.__name__ if name is None else name, runs)
    function(built, **parse_settings(function, settings))
    if dry_run:
        click.echo("\n".join(words.dry_run(built)))
        return
    try:
        nodes = execute(built, executor=executor_of(executor, address))
    except RunInterruptedError as error:
        click.echo(f"koine: {error}", err=True)
        sys.exit(error.exit_code)
    except PlanFailedError as error:
        for failure in error.failures:
            if failure.code != 2:
                click.echo("".join(f"  | {line}\n" for line in failure.lines), err=True, nl=False)
            click.echo(f"koine: {failure.message}", err=True)
        write_report(built)
        sys.exit(error.exit_code)
    click.echo("\n".join(["", *words.summary(nodes), ""]))
    if (
        any(node["status"] == "built" for node in nodes.values())
        or not (built.folder / "report.html").exists()
    ):
        write_report(built)
    for text in built.last_words:
        click.echo(text)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--run", "run_name", required=True, help="Name of the run.")
@click.option("--name", required=True, help="Name of the artifact, as in the plan.")
@RUNS
def adopt(folder: Path, run_name: str, name: str, runs: Path) -> None:
    """Copy FOLDER into a run as an artifact; the plan's step of that name is then never run."""
    from koine.plan.store.adopt import adopt as take

    click.echo(f"adopted: {take(folder, name=name, run=run_name, runs=runs)}")


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the tree as JSON.")
@click.option("--verify", is_flag=True, help="Read every file again and compare it with its recorded sha256.")
def lineage(artifact: Path, as_json: bool, verify: bool) -> None:
    """Print the tree of ancestors of the folder ARTIFACT, with hashes and metrics."""
    from koine.plan.store.lineage import draw, every
    from koine.plan.store.lineage import lineage as tree

    node = tree(artifact, verify=verify)
    click.echo(json.dumps(node.to_json(), ensure_ascii=False, indent=2) if as_json else "\n".join(draw(node)))
    if verify:
        wrong = [f"{one.path}: {problem}" for one in every(node) for problem in one.problems]
        if wrong:
            raise UserError(
                "; ".join(wrong), hint="remove the folder and run the plan again to have it rebuilt"
            )
        if not as_json:
            click.echo("verified: every file is what was recorded")
