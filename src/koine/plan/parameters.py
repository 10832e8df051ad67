"""A plan's parameters as they are set on the command line."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.fields import short_repr

MISSING = inspect.Parameter.empty
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Parameter:
    """A keyword parameter of a plan function; `default` is `MISSING` where it must be given."""

    name: str
    hint: Any
    default: Any

    @property
    def type_name(self) -> str:
        """The annotation as one would write it."""
        return (
            self.hint.__name__
            if isinstance(self.hint, type) and not typing.get_args(self.hint)
            else str(self.hint)
        )


def parameters_of(function: Callable[..., None]) -> list[Parameter]:
    """The keyword parameters of a plan function, in order."""
    hints = typing.get_type_hints(function)
    return [
        Parameter(name, hints.get(name, str), declared.default)
        for name, declared in inspect.signature(function).parameters.items()
        if declared.kind is declared.KEYWORD_ONLY
    ]


def parse_settings(function: Callable[..., None], settings: Iterable[str]) -> dict[str, Any]:
    """Values of `key=value` settings by the types of the function's parameters.

    Raises `UserError` for an unknown key (with the nearest ones), a value of the wrong kind, one key given twice,
    and a parameter without a default that is not given.
    """
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"'{setting}' is not key=value", where="--set")
        if key not in known:
            hint = did_you_mean(key, known) if known else "this plan has no parameters"
            raise UserError(f"unknown key '{key}'", where="--set", hint=hint)
        if key in values:
            raise UserError(f"'{key}' is given twice", where="--set", hint="give it once")
        values[key] = parse_setting(key, text, known[key].hint)
    for name, parameter in known.items():
        if parameter.default is MISSING and name not in values:
            raise UserError(
                f"the plan's parameter '{name}' has no default",
                hint=f"give it: --set {name}={parameter.type_name.upper()}",
            )
    return values


def parse_setting(key: str, text: str, hint: Any) -> Any:
    """The value of `--set key=text` for a parameter annotated with `hint`; a tuple's items are divided by commas."""
    try:
        return _parse(text, hint)
    except ValueError:
        raise UserError(f"{short_repr(text)} does not fit {hint}", where=f"--set {key}") from None


def _parse(text: str, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        for option in arguments:
            if option is not type(None):
                try:
                    return _parse(text, option)
                except ValueError:
                    continue
        raise ValueError(text)
    if origin is typing.Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if hint is bool:
        if text.lower() in TRUE or text.lower() in FALSE:
            return text.lower() in TRUE
        raise ValueError(text)
    if hint is Path:
        if not text or "\0" in text:
            raise ValueError(text)
        return Path(text).expanduser()
    if hint is int:
        return int(text)
    if hint is float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(text)
        return number
    if origin in (tuple, list):
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
            items = [_parse(part, arguments[0]) for part in parts]
            return items if origin is list else tuple(items)
        if len(parts) != len(arguments):
            raise ValueError(text)
        return tuple(_parse(part, item) for part, item in zip(parts, arguments, strict=True))
    if hint in (str, Any):
        return text
    raise ValueError(text)
