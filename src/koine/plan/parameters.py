"""Parameters of a plan function: description, unit, bounds and choices, declared beside each parameter.

    def my_plan(plan: Plan, *, steps: Annotated[int, Parameter("Training steps", unit="steps", low=1)] = 100)
    -> None: ...

A plan function without such annotations works too: only the types of its parameters are checked then.
"""

from __future__ import annotations

import inspect
import itertools
import math
import shutil
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError, did_you_mean
from koine.fields import MAX_INTEGER, check_choice, check_integer, check_number, short_repr
from koine.plan.formatting import table
from koine.plan.step import matches

REQUIRED = inspect.Parameter.empty
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
TYPE_NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", Any: "text"}
MAX_CELL, MIN_DESCRIPTION, DEFAULT_WIDTH = 32, 36, 120
"""Characters of a cell of the table of parameters, of a description, and of a terminal of unknown width."""


@dataclass(frozen=True)
class Parameter:
    """The meaning of a plan's parameter and the values that it takes.

    Bounds and choices hold for the value itself, and for each item where the value is a tuple.
    None is allowed where the type says so.
    """

    description: str
    unit: str = ""
    low: float | None = None
    """Smallest value."""
    high: float | None = None
    """Largest value."""
    above: float | None = None
    """The value must be greater than this."""
    below: float | None = None
    """The value must be less than this."""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeclaredParameter:
    """A keyword parameter of a plan function; `default` is `REQUIRED` where it has none."""

    name: str
    hint: Any
    default: Any
    about: Parameter

    @property
    def type_name(self) -> str:
        """The type in words: `integer`, `text,text,...`, `path or none`."""
        return type_name(self.hint)

    @property
    def values(self) -> str:
        """The values that are allowed, in words: choices, or the type with its bounds."""
        choices = ", ".join(choice or "(empty)" for choice in self.about.choices)
        bounds = bounds_text(self.about)
        return choices or (f"{self.type_name}, {bounds}" if bounds else self.type_name)

    def to_json(self) -> dict[str, Any]:
        """Return the parameter as JSON values; `default` is None too where it is required."""
        about = self.about
        return {
            "parameter": self.name,
            "default": None if self.is_required else self.default,
            "required": self.is_required,
            "type": self.type_name,
            "unit": about.unit,
            **{bound: getattr(about, bound) for bound in ("low", "high", "above", "below")},
            "choices": about.choices,
            "description": about.description,
        }

    @property
    def is_required(self) -> bool:
        """Whether the parameter has no default."""
        return self.default is REQUIRED

    def check(self, value: Any) -> None:
        """Raise `UserError` unless `value` is within the bounds, or among the choices."""
        if isinstance(value, tuple | list):
            for item in value:
                self.check(item)
        elif isinstance(value, bool) or value is None:
            return
        elif self.about.choices:
            check_choice(self.name, value, self.about.choices)
        elif isinstance(value, int | float):
            self._check_bounds(value)

    def _check_bounds(self, value: float) -> None:
        about = self.about
        if isinstance(value, int) and about.above is None:
            low = None if about.low is None else math.ceil(about.low)
            high = MAX_INTEGER if about.high is None else math.floor(about.high)
            check_integer(self.name, value, low=low, high=high)
        else:
            check_number(self.name, value, low=about.low, high=about.high, above=about.above)
        if about.below is not None and not value < about.below:
            raise UserError(
                f"{self.name} is {short_repr(value)}", hint=f"it must be less than {about.below:g}"
            )


def bounds_text(about: Parameter) -> str:
    """Return the bounds in words: `at least 1`, `0 to 1`, `above 0`; empty where there are none."""
    low = f"{about.low:g}" if about.low is not None else ""
    high = f"{about.high:g}" if about.high is not None else ""
    if low and high:
        return f"{low} to {high}"
    words = [
        f"at least {low}" if low else "",
        f"above {about.above:g}" if about.above is not None else "",
        f"at most {high}" if high else "",
        f"below {about.below:g}" if about.below is not None else "",
    ]
    return ", ".join(word for word in words if word)


def type_name(hint: Any) -> str:
    """Return a type annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [type_name(option) for option in arguments if option is not type(None)]
        return " or ".join([*options, *(["none"] if type(None) in arguments else [])])
    if origin is typing.Literal:
        return ", ".join(str(choice) for choice in arguments)
    if origin in (tuple, list):
        if origin is list or (len(arguments) == 2 and arguments[1] is Ellipsis):
            item = type_name(arguments[0])
            return f"{item},{item},..."
        return ",".join(type_name(item) for item in arguments)
    return str(TYPE_NAMES.get(hint) or getattr(hint, "__name__", hint))


def parameters_of(function: Callable[..., None]) -> list[DeclaredParameter]:
    """Return the keyword parameters of a plan function, in order."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, declared in inspect.signature(function).parameters.items():
        if declared.kind is not declared.KEYWORD_ONLY:
            continue
        hint, about = hints.get(name, str), Parameter("")
        if typing.get_origin(hint) is typing.Annotated:
            hint, *extras = typing.get_args(hint)
            about = next((extra for extra in extras if isinstance(extra, Parameter)), about)
        found.append(DeclaredParameter(name, hint, declared.default, about))
    return found


def check_parameters(function: Callable[..., None], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked values of a plan's parameters; text becomes a path, a list a tuple, by type.

    Raises:
        UserError: an unknown name, a value of another type, one out of its bounds, or a required one that is
            missing.
    """
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    for name in given:
        if name not in known:
            raise UserError(f"unknown parameter '{name}'", hint=unknown_hint(name, known))
    values: dict[str, Any] = {}
    for name, parameter in known.items():
        if name not in given:
            if parameter.default is REQUIRED:
                raise UserError(
                    f"the plan's parameter '{name}' has no default",
                    hint=f"give it: --set {name}={parameter.type_name.upper()}",
                )
            continue
        value = convert(given[name], parameter.hint)
        if not matches(value, parameter.hint):
            raise UserError(
                f"{name} is {short_repr(value)}", hint=f"it must be of type: {parameter.type_name}"
            )
        parameter.check(value)
        values[name] = value
    return values


def unknown_hint(name: str, known: Mapping[str, DeclaredParameter]) -> str:
    """Return the hint for an unknown parameter."""
    if name == "threads":
        return "it is a setting of the run: --threads N, or threads=N in Python"
    return did_you_mean(name, known) if known else "this plan has no parameters"


def convert(value: Any, hint: Any) -> Any:
    """Return text as a path, and a list as a tuple, where only these fit the type."""
    if matches(value, hint):
        return value
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if option is Path and isinstance(value, str):
            return Path(value)
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            items = typing.get_args(option)
            items = (items[0],) * len(value) if items[1:] == (Ellipsis,) else items
            if len(items) == len(value):
                return tuple(convert(item, kind) for item, kind in zip(value, items, strict=True))
    return value


def parse_settings(function: Callable[..., None], settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of `key=value` settings, by the types of the function's parameters.

    Bounds and missing parameters are checked by `check_parameters`.

    Raises `UserError` for an unknown key (with the nearest ones), a value of another type, one key given
    twice.
    """
    known = {parameter.name: parameter for parameter in parameters_of(function)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"'{setting}' is not key=value", where="--set")
        if key not in known:
            raise UserError(f"unknown key '{key}'", where="--set", hint=unknown_hint(key, known))
        if key in values:
            raise UserError(f"'{key}' is given twice", where="--set", hint="give it once")
        values[key] = parse_setting(key, text, known[key].hint)
    return values


def parse_setting(key: str, text: str, hint: Any) -> Any:
    """Return the value of `--set key=text` for a parameter of type `hint`; commas separate items.

    Raises `UserError` where the text does not fit the type.
    """
    try:
        return _parse(text, hint)
    except ValueError:
        raise UserError(
            f"{short_repr(text)} does not fit", where=f"--set {key}", hint=f"expected: {type_name(hint)}"
        ) from None


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


def default_text(value: Any) -> str:
    """Return a default as one would set it: `none`, `a,b`, `true`; `(required)` where there is none."""
    if value is REQUIRED:
        return "(required)"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value) or "(empty)"
    return f"{value:g}" if isinstance(value, float) else str(value) or "(empty)"


def parameter_table(function: Callable[..., None]) -> list[str]:
    """Return the lines of a table of a plan's parameters: name, default, unit, allowed values, description.

    Long cells are wrapped, so that the table fits the terminal. In a terminal that is too narrow for five
    columns, each parameter has a line of its own and its description below.
    """
    rows = [("parameter", "default", "unit", "values", "description")]
    for parameter in parameters_of(function):
        about = parameter.about
        default = default_text(parameter.default)
        rows.append((parameter.name, default, about.unit, parameter.values, about.description))
    widths = [min(MAX_CELL, max(len(row[column]) for row in rows)) for column in range(4)]
    terminal = shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns
    room = terminal - sum(widths) - 2 * len(widths)
    if room < MIN_DESCRIPTION:
        return _parameter_list(rows[1:], terminal)
    widths.append(room)
    lines: list[tuple[str, ...]] = []
    for row in rows:
        cells = [
            textwrap.wrap(cell, width, break_on_hyphens=False) or [""]
            for cell, width in zip(row, widths, strict=True)
        ]
        lines += itertools.zip_longest(*cells, fillvalue="")
    return table(lines)


def _parameter_list(rows: Iterable[tuple[str, ...]], width: int) -> list[str]:
    """Return `name=default unit (values)` and below it the description, for each row."""
    lines: list[str] = []
    for name, default, unit, values, description in rows:
        heading = f"{name}={default}{' ' if unit else ''}{unit} ({values})"
        for text, first, later in ((heading, "", "    "), (description, "  ", "  ")):
            lines += textwrap.wrap(
                text,
                max(width, MIN_DESCRIPTION),
                initial_indent=first,
                subsequent_indent=later,
                break_on_hyphens=False,
            )
    return lines
