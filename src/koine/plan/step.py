"""The `@step` decorator, and the checks of a step's arguments against its signature."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from koine.errors import UserError, did_you_mean

Function = TypeVar("Function", bound=Callable[..., None])


@dataclass(frozen=True)
class Estimate:
    """Expected peak memory in bytes, time in seconds and disk space in bytes of a step."""

    memory_bytes: int
    seconds: float
    disk_bytes: int = 0
    """Bytes of the artifact."""
    temporary_bytes: int = 0
    """Further bytes on disk while the step runs, for example checkpoints."""
    basis: str = ""
    """One sentence about where the time comes from; empty: from fixed rates."""
    measured: bool = True
    """False where the time rests on an assumed speed, because this machine's could not be measured."""


@dataclass(frozen=True)
class PlannedInput:
    """An input of a step before the run, as the step's `check` sees it."""

    path: Path
    """Its place, now or later."""
    exists: bool
    """Whether it is there now and stays: an input of the plan, or an artifact that is up to date."""
    facts: Any = None
    """Result of the `check` of the step that will write it; None: nothing is known."""


@dataclass(frozen=True)
class StepInfo:
    """The arguments of `@step`, kept on the function."""

    version: str
    estimate: Callable[..., Estimate] | None
    threads: int
    formerly: tuple[str, ...]
    check: Callable[..., Any] | None = None


def step(
    version: str = "1",
    estimate: Callable[..., Estimate] | None = None,
    threads: int = 1,
    formerly: tuple[str, ...] = (),
    check: Callable[..., Any] | None = None,
) -> Callable[[Function], Function]:
    """Mark a function as a step of plans; it stays a plain function.

    Args:
        version: part of the fingerprint. Raise it when the same inputs and parameters shall give another
            result.
        estimate: function that returns the step's `Estimate`. It gets the step's arguments but `out`, its
            inputs as paths that may not exist yet. Where it has a parameter `threads`, it gets the CPU cores;
            where it has one called `planned`, a dictionary of the inputs as `check` gets them.
        threads: CPU cores that the step uses; 0: as many as the run gives to each step (`koine run
            --threads`).
            A parameter `threads` of the step itself comes first.
        formerly: earlier names (`module:function`) of the same step. Artifacts built under them are reused.
        check: function that finds mistakes before anything runs. It gets the step's arguments but `out`, with
            a `PlannedInput` for each input. It raises `UserError` for what cannot work, warns with
            `KoineWarning` of what may surprise, and returns what is known of the output: the `facts` of the
            steps that read it.
    """

    def mark(function: Function) -> Function:
        for name in {"name", "purpose"} & inspect.signature(function).parameters.keys():
            raise UserError(
                f"a step's parameter cannot be called '{name}', which is one of plan.step",
                where=function.__qualname__,
                hint="call it otherwise",
            )
        function.__koine_step__ = StepInfo(version, estimate, threads, formerly, check)  # type: ignore[attr-defined]
        return function

    return mark


def split_arguments(
    function: Callable[..., None], given: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a step's inputs (positional) and parameters (keyword-only, defaults filled in).

    Raises `UserError` for an unknown or missing name, and for a value of another type.
    """
    name = function.__qualname__
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function).parameters
    if "out" not in signature:
        raise UserError("a step needs a parameter `out: Path`", where=name)
    known = [key for key in signature if key != "out"]
    inputs: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for key in given:
        if key not in known:
            raise UserError(f"step has no parameter '{key}'", where=name, hint=did_you_mean(key, known))
    for key in known:
        declared = signature[key]
        if key not in given and declared.default is inspect.Parameter.empty:
            raise UserError(f"parameter '{key}' is missing", where=name)
        value = given.get(key, declared.default)
        if declared.kind is inspect.Parameter.KEYWORD_ONLY:
            if not matches(value, hints.get(key, Any)):
                raise UserError(f"parameter '{key}' must be {hints[key]}, got {value!r}", where=name)
            parameters[key] = value
        else:
            if value is None and declared.default is not None and not matches(None, hints.get(key, Any)):
                raise UserError(f"input '{key}' must be an artifact, got None", where=name)
            inputs[key] = value
    return inputs, parameters


def matches(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the annotated type; an int counts as a float, a bool not as an int."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple and isinstance(value, tuple):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return all(matches(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(matches, value, arguments))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
