"""Load plan functions from a file, and make plans of them."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.plan.parameters import REQUIRED, check_parameters, parameters_of
from koine.plan.plan import PLAN_FILE, Plan


def load_plan_file(path: Path) -> ModuleType:
    """Import a file of plans under a name of its own; it can import its neighbours.

    Raises `UserError` where the file is missing, is not Python, or fails while it is imported.
    """
    if not path.is_file():
        raise UserError("no such plan file", where=path)
    folder = path.parent.resolve()
    for place in (folder, _package_root(folder)):
        if str(place) not in sys.path:
            # At the end: a neighbour called `random.py` must not hide the standard library's.
            sys.path.append(str(place))
    name = PLAN_FILE + path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError("not a Python file", where=path, hint="give path/to/file.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except SyntaxError as error:
        if Path(error.filename or "").resolve() != path.resolve():
            path = Path(error.filename or path)
        raise UserError(
            f"not valid Python ({error.msg})", where=f"{path}:{error.lineno}", hint="fix the plan file"
        ) from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        raise UserError(
            f"cannot be imported ({type(error).__name__}: {error})",
            where=f"{path}:{lines[-1]}" if lines else path,
            hint="fix the plan file",
        ) from error
    return module


def _package_root(folder: Path) -> Path:
    """Return the folder from which `folder`'s package is imported; `folder` itself outside of packages."""
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    return folder


def functions_of(module: ModuleType) -> list[str]:
    """Return the names of the functions that a module defines itself and that take a plan."""
    found = []
    for key, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            first = next(iter(inspect.signature(value).parameters), None)
            if first == "plan":
                found.append(key)
    return found


def load_plan_function(text: str) -> Callable[..., None]:
    """Return the plan function of `path/to/file.py:function`.

    Raises `UserError` where the file cannot be imported or has no such function.
    """
    place, colon, name = text.rpartition(":")
    if not colon:
        known = functions_of(load_plan_file(Path(text)))
        choice = " or ".join(f"{text}:{item}" for item in known) or "add a function `def name(plan): ...`"
        raise UserError("which plan of this file?", where=text, hint=f"say {choice}" if known else choice)
    module = load_plan_file(Path(place))
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        known = functions_of(module) or [
            key for key, value in vars(module).items() if inspect.isfunction(value)
        ]
        raise UserError(f"no plan function '{name}'", where=text, hint=did_you_mean(name, known))
    return function


def make_plan(
    function: Callable[..., None],
    parameters: Mapping[str, Any],
    *,
    name: str | None = None,
    runs: Path = Path("runs"),
    threads: int | None = None,
) -> Plan:
    """Return the plan of a plan function: its parameters checked, its steps added, nothing run.

    Args:
        function: adds the steps to its first argument, a `Plan`.
        parameters: values of its keyword parameters.
        name: name of the run; the function's name by default.
        runs: folder of all runs.
        threads: CPU cores of each step that trains or evaluates; the plan's own choice by default.

    Raises:
        UserError: a parameter is unknown, missing, of another type, or out of its bounds.
    """
    values = check_parameters(function, parameters)
    plan = Plan(function.__name__ if name is None else name, runs, threads)
    defaults = {one.name: one.default for one in parameters_of(function) if one.default is not REQUIRED}
    plan.parameters = {**defaults, **values}
    function(plan, **values)
    return plan
