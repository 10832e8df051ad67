"""Tests of programs: what is read from records, how outputs are compared, the filter's system call numbers."""

from __future__ import annotations

import json
import platform
import re
import struct
from collections import Counter, namedtuple
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from koine.align.sandbox import ProgramTest, read_test
from koine.align.sandbox.program_tests import decode, equal
from koine.align.sandbox.runner import encode
from koine.align.sandbox.seccomp import DENIED, filter_program
from koine.errors import UserError

Point = namedtuple("Point", "x y")


class Colour(IntEnum):
    RED = 3


def test_tests_of_records() -> None:
    assert read_test({"stdin": "1", "expected": "2"}) == ProgramTest("2", stdin="1")
    assert read_test({"expression": "f(1)", "expected": [1, 2]}) == ProgramTest([1, 2], expression="f(1)")
    assert read_test("assert f('a', x=[1]) == {'a': (1, -2.5)}") == ProgramTest(
        {"a": (1, -2.5)}, expression="f('a', x=[1])"
    )
    assert read_test("assert sorted(f(3)) == [1]").job() == {"expression": "sorted(f(3))"}
    assert read_test("assert f(3) is None").expected is None


@pytest.mark.parametrize(
    "test",
    [
        "f(1) == 2",
        "assert f(1)",
        "assert f(1) == g(2)",
        "assert f(1) < 2",
        "assert f(1) == 2; import os",
        "assert f(",
        {"stdin": "1"},
        {"stdin": "1", "expected": 3},
        {"stdin": "1", "expression": "f(1)", "expected": "3"},
        {"expression": "f(", "expected": 3},
        {"expression": "x = 1", "expected": 3},
        7,
        None,
    ],
)
def test_what_is_no_test_is_refused(test: Any) -> None:
    with pytest.raises(UserError, match="record 3"):
        read_test(test, where="record 3")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -17, 10**400, 0.1, -1e300, "", 'a"\\\n\u2028\ud800', [], (), {1, 2}),
        {"a": [(1, "x")], (1, 2): {3: None}},
        [[[[]]]],
    ],
)
def test_values_cross_the_border_as_they_are(value: Any) -> None:
    back = decode(json.loads(encode(value)))
    assert back == value
    assert type(back) is type(value)


def test_values_of_subclasses_and_infinities() -> None:
    value = [Point(1, 2), Counter("aab"), Colour.RED, frozenset({1}), float("inf")]
    assert decode(json.loads(encode(value))) == [(1, 2), {"a": 2, "b": 1}, 3, {1}, float("inf")]
    assert str(decode(json.loads(encode(float("nan"))))) == "nan"
    with pytest.raises(TypeError):
        encode(object())


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (0.1 + 0.2, 0.3, True),
        (1, 1.0, True),
        (0.3001, 0.3, False),
        ([0.1 + 0.2], [0.3], True),
        ((1, 2), [1, 2], True),
        ([1, 2], (1, 2), False),
        ({"a": 0.1 + 0.2}, {"a": 0.3}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (10**400, 1.0, False),
        ([1], [1, 2], False),
        (None, False, False),
    ],
)
def test_equality(value: Any, expected: Any, same: bool) -> None:
    assert equal(value, expected) is same


@pytest.mark.parametrize(
    "output",
    ["", "1", "[1]", '{"int": "x"}', '{"list": 3}', "[" * 100_000, '{"dict": [[{"list": []}, null]]}'],
)
def test_outputs_that_are_no_values_fail(output: str) -> None:
    assert not ProgramTest(1, expression="f()").passes(output)


def test_printed_text_is_compared_without_trailing_space() -> None:
    test = ProgramTest("a\nb c", stdin="")
    assert test.passes("a  \nb c\n\n")
    assert not test.passes("a\nb  c")


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", HEADERS)
def test_system_call_numbers_are_the_kernels(machine: str) -> None:
    path = HEADERS[machine]
    if not path.is_file():
        pytest.skip(f"the kernel's headers are not installed: {path}")
    text = path.read_text()
    known = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+)\s+(\d+)\s*$", text, re.M)}
    column = list(HEADERS).index(machine)
    assert {name: numbers[column] for name, numbers in DENIED.items()} == {
        name: known.get(name, DENIED[name][column]) for name in DENIED
    }
    assert len(DENIED.keys() & known.keys()) > 30


@pytest.mark.parametrize("machine", HEADERS)
def test_filter_by_an_interpreter_of_our_own(machine: str) -> None:
    """Run the BPF program by the rules of seccomp(2) for every call number."""
    program = filter_program(machine)
    assert program is not None
    lines = [struct.unpack_from("=HBBI", program, 8 * i) for i in range(len(program) // 8)]
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(number: int, arch: int) -> int:
        accumulator, at = 0, 0
        while True:
            code, if_true, if_false, value = lines[at]
            at += 1
            if code == 0x20:
                accumulator = {0: number, 4: arch}[value]
            elif code == 0x06:
                return value
            else:
                holds = accumulator == value if code == 0x15 else accumulator >= value
                at += if_true if holds else if_false

    denied = {numbers[list(HEADERS).index(machine)] for numbers in DENIED.values()}
    for number in range(500):
        assert verdict(number, architecture) == (0x00050001 if number in denied else 0x7FFF0000), number
    assert verdict(1, 0x40000003) == 0x80000000
    if machine == "x86_64":
        assert verdict(0x40000001, architecture) == 0x00050001


def test_other_machines_have_no_filter() -> None:
    assert filter_program("riscv64") is None
    assert platform.machine()
