"""A Jinja sandbox with limits on time, output and sizes of values, because templates come from strangers.

Python cannot interrupt a call that computes `9**9**9` or pads a text to a gigabyte, so such calls are
measured before they run. Loops, macros, calls and filters check the clock. A container counts with all that
it holds, as often as it holds it, so one that doubles itself ends early too.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from koine.errors import UserError

SECONDS = 10.0
"""Most seconds to render one conversation."""
MOST_CHARACTERS = 16_000_000
"""Most characters of output, and of any intermediate text, plus sixteen times those of the messages."""
MOST_ITEMS = 1_000_000
"""Most items of a list, including those of nested lists."""
MOST_BITS = 100_000
LARGEST_TEMPLATE = 100_000
"""Most characters of a template. Compiling takes 25 s a million, and cannot be interrupted."""
_LARGEST_OPTION = 1000


class TooMuchError(Exception):
    """The template exceeds a limit, which the message names."""


class Budget:
    """The remaining time and output while one conversation is rendered."""

    def __init__(self, characters: int) -> None:
        """characters: of the messages that are rendered."""
        self.most = MOST_CHARACTERS + 16 * characters
        self._produced = self._made = 0
        self._until = time.monotonic() + SECONDS

    def spend(self, characters: int = 0) -> None:
        """Check the clock, and count characters that were written."""
        self._produced += characters
        if self._produced > 4 * self.most:
            raise TooMuchError(f"writes more than {self.most:,} characters")
        if time.monotonic() > self._until:
            raise TooMuchError(f"takes more than {SECONDS:g} seconds")

    def allow(self, characters: int) -> None:
        """Raise `TooMuchError` for a text of so many characters, before it is made."""
        if characters > self.most:
            raise TooMuchError(f"makes a text of more than {self.most:,} characters")

    def bounded(self, value: Any) -> Any:
        """Return the value. Raises `TooMuchError` if it is too large."""
        if isinstance(value, str):
            self.allow(len(value))
            self._made += len(value)
            if self._made > 50 * self.most:
                raise TooMuchError(f"makes texts of more than {50 * self.most:,} characters in all")
        elif isinstance(value, int):
            if value.bit_length() > MOST_BITS:
                raise TooMuchError(f"makes a number of more than {MOST_BITS:,} bits")
        elif isinstance(value, list | tuple | dict):
            self.size(value)
        return value

    def size(self, value: Any) -> int:
        """Return a lower bound of the characters that a value takes when written.

        A value counts once for every place that holds it.
        """
        if isinstance(value, str | bytes):
            return len(value)
        if not isinstance(value, list | tuple | dict):
            return 1
        total = items = 0
        waiting: list[Any] = [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                total += len(one)
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple):
                waiting += one
            items += 1
            if items + len(waiting) > MOST_ITEMS:
                raise TooMuchError(f"makes a list of more than {MOST_ITEMS:,} items")
        self.allow(total)
        return total + items


_budget: ContextVar[Budget] = ContextVar("koine_template_budget")


@contextmanager
def limited(characters: int) -> Iterator[Budget]:
    """Apply the limits to everything that is rendered inside."""
    budget = Budget(characters)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where every loop, call, filter and growing operator checks the budget."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_written, **options)
        self.filters = {name: _guarded(name, function) for name, function in self.filters.items()}
        # It generates text of any length, and no template needs it.
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter of our own, under the limits."""
        self.filters[name] = _guarded(name, function)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator; its result is measured before."""
        _check_operator(_budget.get(), operator, left, right)
        return _budget.get().bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function of the template.

        jinja2 names the first arguments so that keywords stay free.
        """
        budget = _budget.get()
        budget.spend()
        owner = getattr(__obj, "__self__", getattr(getattr(__obj, "__wrapped__", None), "__self__", None))
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            args = _check_text(budget, name, owner, args, kwargs)
        elif isinstance(owner, bytes | int):
            _check_numbers((*args, *kwargs.values()), _LARGEST_OPTION)
        elif name == "strftime_now":
            formats = [text for text in (*args, *kwargs.values()) if isinstance(text, str)]
            if any(len(text) > _LARGEST_OPTION for text in formats):
                raise TooMuchError(f"gives strftime_now a text of more than {_LARGEST_OPTION:,} characters")
            budget.allow(sum(map(_widths, formats)))
        return budget.bounded(super().call(__context, __obj, *args, **kwargs))

    def tick(self, characters: int) -> str:
        """Count one pass of a loop or one call of a macro, whose own text has so many characters."""
        _budget.get().spend(characters)
        return ""

    def kept(self, value: Any) -> Any:
        """Check a list, tuple or dictionary that the template writes out."""
        return _budget.get().bounded(value)

    def joined(self, *values: Any) -> str:
        """Join values as `~` does."""
        budget = _budget.get()
        budget.allow(sum(map(budget.size, values)))
        return "".join(map(str, values))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        blocks: list[nodes.For | nodes.Macro | nodes.CallBlock] = list(
            template.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        )
        for node in blocks:
            own = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            node.body.insert(0, _statement("tick", nodes.Const(own), node.lineno))
        sized: nodes.Template = _Sized().visit(template)
        return sized


class _Sized(jinja2.visitor.NodeTransformer):
    """Wrap lists, dictionaries and joined texts so that they are measured."""

    def visit_List(self, node: nodes.Expr) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        return _call("kept", [self.generic_visit(node)], node.lineno)

    def visit_Dict(self, node: nodes.Expr) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        return _call("kept", [self.generic_visit(node)], node.lineno)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        inside = self.generic_visit(node)
        return inside if node.ctx != "load" else _call("kept", [inside], node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        self.generic_visit(node)
        return _call("joined", node.nodes, node.lineno)


def _call(method: str, arguments: list[Any], line: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)


def _statement(method: str, argument: nodes.Expr, line: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_call(method, [argument], line), lineno=line)


def _written(value: Any) -> Any:
    """Count and return the value that `{{ value }}` writes."""
    budget = _budget.get(None)
    if budget is not None:
        budget.spend(budget.size(value))
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that its arguments and its result are measured."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.spend()
        # jinja2 passes its own objects first to some filters; the value is the first argument after them.
        own = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0
        if len(args) > own:
            value, rest = args[own], args[own + 1 :]
            checked = _check_filter(budget, name, value, rest, kwargs)
            args = (*args[:own], checked, *rest)
        return budget.bounded(function(*args, **kwargs))

    return guarded


def _check_numbers(values: Sequence[Any], most: int) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > most:
            raise TooMuchError(
                f"asks for {value:,}" if abs(value) < 10**30 else "asks for a number without end"
            )


def _check_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    if operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * max(right, 0) > MOST_BITS:
            raise TooMuchError(f"makes a number of more than {MOST_BITS:,} bits")
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and isinstance(value, str | bytes | list | tuple):
                budget.allow(budget.size(value) * max(times, 0))
    elif operator == "+":
        if isinstance(left, str | bytes | list | tuple) and isinstance(right, str | bytes | list | tuple):
            budget.allow(budget.size(left) + budget.size(right))
    elif operator == "%" and isinstance(left, bytes):
        raise TooMuchError("formats bytes")
    elif operator == "%" and isinstance(left, str):
        _check_text(budget, "format", left, (right,), {})


def _widths(text: str) -> int:
    """Sum the numbers in the placeholders of a format, each of which may be a width."""
    places = re.findall(r"%[^a-zA-Z%]*|\{[^}]*", text)
    return sum(int(number[:20]) for place in places for number in re.findall(r"[0-9]+", place))


def _check_text(
    budget: Budget, method: str, owner: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Measure the result of a string method before it runs; return its arguments, iterators as lists."""
    values = [*args, *kwargs.values()]
    if method in ("format", "format_map"):
        # A star, or braces inside braces, take their width from the arguments.
        inner = owner.count("*") + len(re.findall(r"\{[^}]*\{", owner))
        widths = _widths(owner) + inner * sum(map(abs, _numbers(values)))
        largest = max(map(budget.size, values), default=0)
        budget.allow(len(owner) + widths + largest * (owner.count("{") + owner.count("%")))
        return args
    _check_numbers(values, budget.most)
    if method == "join" and args:
        items = args[0] if isinstance(args[0], str | list | tuple) else list(args[0])
        budget.allow(budget.size(items) + len(owner) * len(items))
        return (items, *args[1:])
    if method == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        budget.allow(len(owner) + owner.count(args[0]) * len(args[1]))
    elif method == "expandtabs":
        budget.allow(len(owner) + owner.count("\t") * max(map(abs, _numbers(values)), default=8))
    elif method == "translate":
        budget.allow(len(owner) * max(map(budget.size, values), default=1))
    return args


def _numbers(values: Sequence[Any]) -> Iterator[int]:
    for value in values:
        if isinstance(value, int):
            yield value
        elif isinstance(value, list | tuple | dict):
            inside = value.values() if isinstance(value, dict) else value
            yield from (one for one in inside if isinstance(one, int))


def _check_filter(
    budget: Budget, name: str, value: Any, rest: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Measure the result of a filter before it runs; return the value, a one-pass iterator as a list."""
    options = [*rest, *kwargs.values()]
    if name in ("tojson", "round", "pprint"):
        _check_numbers(options, _LARGEST_OPTION)
    elif name in ("batch", "center", "indent", "slice", "truncate", "urlize", "wordwrap"):
        _check_numbers(options, MOST_ITEMS)
    texts = [one for one in options if isinstance(one, str)]
    if name == "join":
        items = value if isinstance(value, str | list | tuple | dict) else list(value)
        budget.allow(budget.size(items) + max(map(len, texts), default=0) * len(items))
        return items
    if name == "replace" and isinstance(value, str) and len(texts) >= 2:
        budget.allow(len(value) + value.count(texts[0]) * len(texts[1]))
    elif name == "format" and isinstance(value, str):
        _check_text(budget, "format", value, tuple(options), {})
    elif name == "indent" and isinstance(value, str):
        widths = [one for one in options if isinstance(one, int)] + [len(text) for text in texts]
        budget.allow(len(value) + (value.count("\n") + 1) * max(widths, default=4))
    elif name in ("wordwrap", "urlize", "tojson") and sum(map(len, texts)) > _LARGEST_OPTION:
        raise TooMuchError(f"gives {name} a text of more than {_LARGEST_OPTION:,} characters")
    elif name == "sum" and isinstance(value, list | tuple):
        budget.size(value)
    return value


def check_long(template: str) -> None:
    """Raise `UserError` for a template that is too long."""
    if len(template) > LARGEST_TEMPLATE:
        raise UserError(
            f"a chat template of {len(template):,} characters",
            hint=f"give one of at most {LARGEST_TEMPLATE:,}",
        )
