"""The mark that makes a plain function a step of a plan, and the reading of its signature."""

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
    """What a step is expected to need: peak memory in bytes and time in seconds."""

    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class StepInfo:
    """What `@step` records on a function."""

    version: str
    estimate: Callable[..., Estimate] | None
    threads: int


def step(
    version: str = "1", estimate: Callable[..., Estimate] | None = None, threads: int = 1
) -> Callable[[Function], Function]:
    """Mark a function as a step; it stays a plain function. `threads` is its budget of cores in a plan."""

    def mark(function: Function) -> Function:
        function.__koine_step__ = StepInfo(version, estimate, threads)  # type: ignore[attr-defined]
        return function

    return mark


def split(function: Callable[..., None], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and parameters (defaults filled in) of a call; a wrong name or type is a `UserError`."""
    name = function.__qualname__
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function).parameters
    known = [key for key in signature if key != "out"]
    inputs: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for key in given:
        if key not in known:
            raise UserError(f"step has no parameter '{key}'", where=name, mend=did_you_mean(key, known))
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
            inputs[key] = value
    return inputs, parameters


def matches(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type; an int passes for a float, a bool not for an int."""
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


def parse_setting(key: str, text: str, hint: Any) -> Any:
    """The value of `--set key=text` for a parameter annotated with `hint`."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options and text.lower() == "none":
        return None
    for option in options:
        try:
            if option is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if option in (int, float, str, Path):
                return option(text)
            if typing.get_origin(option) is tuple:
                element = typing.get_args(option)[0]
                return tuple(element(item) for item in text.split(",") if item)
        except ValueError:
            continue
    raise UserError(f"'{text}' does not fit {hint}", where=f"--set {key}")
