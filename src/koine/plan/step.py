"""The mark that makes a plain function a step of a plan, and the reading of its signature."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    """Mark a function as a step; it stays a plain function.

    `version` goes into the fingerprint: raise it when the same inputs and parameters are to give another result.
    `estimate` is called with the step's own arguments but `out` (paths may not exist yet) and says what it will need.
    `threads` is the step's budget of cores in a plan, unless it has a parameter of that name.
    """

    def mark(function: Function) -> Function:
        function.__koine_step__ = StepInfo(version, estimate, threads)  # type: ignore[attr-defined]
        return function

    return mark


def split(function: Callable[..., None], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and parameters (defaults filled in) of a call; a wrong name or type is a `UserError`."""
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
