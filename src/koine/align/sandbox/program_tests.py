"""Tests of programs: an input that goes into the sandbox, and the expected output, which stays outside."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from koine.errors import UserError
from koine.fields import short_repr

RELATIVE_TOLERANCE = 1e-9
"""Two floats are equal within this, relative to the greater."""
_LITERALS = "numbers, strings, booleans, None, lists, tuples, sets, dictionaries"
_Values = list[Any] | tuple[Any, ...]


@dataclass(frozen=True)
class ProgramTest:
    """One test of a program.

    stdin: standard input of a program; what it prints is compared with `expected`, a string.
    expression: evaluated in the program's names; its value is compared with `expected`, a literal.
    Exactly one of the two is not None.
    """

    expected: Any
    stdin: str | None = None
    expression: str | None = None

    def job(self) -> dict[str, str]:
        """Return what goes into the sandbox: the input without the expected output."""
        if self.stdin is not None:
            return {"stdin": self.stdin}
        assert self.expression is not None
        return {"expression": self.expression}

    def passes(self, output: str) -> bool:
        """Return whether an output that came out of the sandbox is the expected one.

        Printed text is compared without white space at the ends of lines and of the whole. Values are compared
        as Python compares them, floats with a relative tolerance of 1e-9.
        """
        if self.stdin is not None:
            return _stripped(output) == _stripped(self.expected)
        try:
            value = decode(json.loads(output))
        except (ValueError, TypeError, RecursionError):
            # Not written by the runner's `encode`: the program wrote in its place.
            return False
        return equal(value, self.expected)


def read_test(test: Any, where: str | None = None) -> ProgramTest:
    """Return the test that a record's entry describes.

    Args:
        test: `{"stdin": text, "expected": text}`, `{"expression": Python, "expected": literal}`, or a string
            `assert EXPRESSION == LITERAL`.
        where: for the message.

    Raises:
        UserError: The entry is neither.
    """
    if isinstance(test, str):
        return _from_assert(test, where)
    if isinstance(test, Mapping) and "expected" in test:
        stdin, expression, expected = test.get("stdin"), test.get("expression"), test["expected"]
        if isinstance(stdin, str) and expression is None and isinstance(expected, str):
            return ProgramTest(expected, stdin=stdin)
        if isinstance(expression, str) and stdin is None:
            _check_expression(expression, where)
            return ProgramTest(expected, expression=expression)
    raise UserError(
        f"{short_repr(test)} is no test of a program",
        where=where,
        hint="write {'stdin': text, 'expected': text}, {'expression': Python, 'expected': value} or 'assert f(1) == 2'",
    )


def decode(value: Any) -> Any:
    """Return the value that the runner's `encode` wrote; raise `ValueError` or `TypeError` for anything else."""
    if value is None or isinstance(value, bool | str):
        return value
    (kind, content), *more = value.items() if isinstance(value, dict) else [("", None)]
    if more or not isinstance(content, str | list):
        raise ValueError("no value")
    if kind == "int" and isinstance(content, str):
        return int(content, 16)
    if kind == "float" and isinstance(content, str):
        return float(content)
    if isinstance(content, list):
        if kind == "dict":
            return {decode(key): decode(one) for key, one in content}
        makers: dict[str, type[list[Any]] | type[tuple[Any, ...]] | type[set[Any]]]
        makers = {"list": list, "tuple": tuple, "set": set}
        if kind in makers:
            return makers[kind](decode(one) for one in content)
    raise ValueError("no value")


def equal(value: Any, expected: Any) -> bool:
    """Return whether two literals are equal, floats within the tolerance; JSON's lists stand for tuples too."""
    if isinstance(value, float) or isinstance(expected, float):
        if isinstance(value, bool | int | float) and isinstance(expected, bool | int | float):
            try:
                return math.isclose(value, expected, rel_tol=RELATIVE_TOLERANCE) or (
                    math.isnan(value) and math.isnan(expected)
                )
            except OverflowError:
                # An integer beyond the range of floats.
                return False
        return False
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        same_kind = type(value) is type(expected) or isinstance(expected, list)
        return same_kind and len(value) == len(expected) and all(map(equal, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(equal(value[key], expected[key]) for key in value)
    return bool(value == expected)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _check_expression(expression: str, where: str | None) -> None:
    try:
        ast.parse(expression, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the expression {short_repr(expression)} is no Python", where=where) from error


def _from_assert(line: str, where: str | None) -> ProgramTest:
    """Return the test of `assert EXPRESSION == LITERAL`."""
    problem = UserError(
        f"{short_repr(line)} is not `assert EXPRESSION == LITERAL`",
        where=where,
        hint=f"the right side stays outside of the sandbox, so it must be a literal: {_LITERALS}",
    )
    try:
        body = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise problem from error
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise problem
    test = body[0].test
    if not isinstance(test, ast.Compare):
        raise problem
    if len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq | ast.Is):
        raise problem
    try:
        expected = ast.literal_eval(test.comparators[0])
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise problem from error
    return ProgramTest(expected, expression=ast.unparse(test.left))
