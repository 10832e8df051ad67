"""`koine run`: build what is missing, reuse what is there."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from koine.errors import UserError, did_you_mean


def find_plan(text: str) -> Callable[..., None]:
    """The plan function of a recipe's name or of `path/to/file.py:function`."""
    if ":" in text:
        place, _, name = text.rpartition(":")
        path = Path(place)
        if not path.is_file():
            raise UserError("no such plan file", where=path)
        sys.path.insert(0, str(path.parent.resolve()))
        try:
            module = importlib.import_module(path.stem)
        except SyntaxError as error:
            raise UserError(
                f"not valid Python ({error.msg})", where=f"{place}:{error.lineno}", mend="mend the plan file"
            ) from None
    else:
        import koine.recipes

        known = [item.name for item in pkgutil.iter_modules(koine.recipes.__path__)]
        name = text
        if text not in known:
            raise UserError(f"unknown recipe '{text}'", mend=did_you_mean(text, known))
        module = importlib.import_module(f"koine.recipes.{text}")
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"no plan function '{name}'", where=text, mend=did_you_mean(name, own))
    return function


def settings_of(function: Callable[..., None], settings: tuple[str, ...]) -> dict[str, Any]:
    """`--set key=value` pairs, by the types of the plan's parameters."""
    from koine.plan.step import parse_setting

    hints = typing.get_type_hints(function)
    known = [key for key, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"'{setting}' is not key=value", where="--set")
        if key not in known:
            raise UserError(f"unknown key '{key}'", where="--set", mend=did_you_mean(key, known))
        values[key] = parse_setting(key, text, hints.get(key, str))
    return values


@click.command()
@click.argument("plan")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the plan.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("runs"), show_default=True)
@click.option("--name", default=None, help="Name of the run; by default the plan's.")
@click.option("--dry-run", is_flag=True, help="Show what would run, and why.")
def run(plan: str, settings: tuple[str, ...], runs: Path, name: str | None, dry_run: bool) -> None:
    """Run PLAN: a recipe's name or path/to/file.py:function."""
    from koine.plan import Plan
    from koine.plan.local import StepFailedError, execute
    from koine.plan.plan import why

    function = find_plan(plan)
    built = Plan(name or function.__name__, runs)
    function(built, **settings_of(function, settings))
    if dry_run:
        for node in built.nodes.values():
            click.echo(f"{node.artifact.name}: {'; '.join(why(node)) or 'reused'}")
        return
    try:
        execute(built, say=click.echo)
    except StepFailedError as error:
        click.echo(f"koine: {error}", err=True)
        sys.exit(1)
