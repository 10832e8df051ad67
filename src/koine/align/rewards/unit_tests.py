"""Reward for programs: the share of unit tests that a completion's code passes, in a sandbox."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from koine.align.rewards.reward import Answered, Conversation, Record, RewardOutcome, single_value
from koine.align.sandbox import Limits, ProgramTest, Sandbox, SandboxError, read_test
from koine.errors import UserError
from koine.fields import check_integer, check_number, short_repr

LEAST_TESTS = 4
"""Fewer tests are passed by chance, or by programs written for them."""
WITHOUT_CODE = -1.0
"""Value of a completion without a code block."""

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n`]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"", "py", "python", "python3"})


@dataclass(frozen=True, kw_only=True)
class UnitTests:
    """Share of the record's `tests` that the completion's last Python code block passes; -1 without one.

    The code runs in bubblewrap (`koine.align.sandbox`). A record needs at least four tests.

    seconds, memory_mib, processes: limits of a program.
    workers: programs at a time; 0 for one a processor core.
    """

    seconds: float = 4.0
    memory_mib: int = 256
    processes: int = 8
    workers: int = 0
    sandbox: Sandbox = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, above=0.0)
        check_integer("memory_mib", self.memory_mib, low=32, high=1 << 20)
        check_integer("workers", self.workers, low=0, high=1024)
        limits = Limits(seconds=self.seconds, memory_bytes=self.memory_mib << 20, processes=self.processes)
        object.__setattr__(self, "sandbox", Sandbox(limits))

    def check(self, record: Record) -> None:
        """Raise `UserError` for a record without four tests, and where this machine has no sandbox."""
        read_tests(record)
        self.sandbox.check()

    def __call__(self, conversation: Conversation, completion: str, record: Record) -> float:
        """Return the share of tests passed by one completion, or -1."""
        return single_value(self.outcomes([Answered(conversation, completion, record)]))

    def outcomes(self, answered: Sequence[Answered]) -> list[RewardOutcome]:
        """Run the programs of all completions, several at a time."""
        tests = [read_tests(one.record) for one in answered]
        codes = [last_code_block(one.completion) for one in answered]
        programs = [(code, some) for code, some in zip(codes, tests, strict=True) if code is not None]
        if programs:
            self.sandbox.check()
        results = iter(self.sandbox.run_all(programs, self.workers or None))
        outcomes = []
        for code in codes:
            if code is None:
                outcomes.append(RewardOutcome(WITHOUT_CODE))
                continue
            result = next(results)
            if isinstance(result, SandboxError):
                outcomes.append(RewardOutcome(None, str(result)))
            else:
                outcomes.append(RewardOutcome(sum(test.passed for test in result) / len(result)))
        return outcomes


def read_tests(record: Record) -> list[ProgramTest]:
    """Return a record's tests; raise `UserError` where there are fewer than four, or one is none."""
    tests = record.get("tests")
    if not isinstance(tests, list | tuple):
        raise UserError(f"the record's tests are {short_repr(tests)}", hint="add a list `tests`")
    if len(tests) < LEAST_TESTS:
        raise UserError(
            f"the record has {len(tests)} test{'s' * (len(tests) != 1)}",
            hint=f"give at least {LEAST_TESTS}, or leave the record out: fewer are passed by chance",
        )
    return [read_test(test, f"test {number}") for number, test in enumerate(tests, 1)]


def last_code_block(text: str) -> str | None:
    """Return the content of the last closed code block in Python or without a language; None without one."""
    blocks = [code for name, code in _BLOCK.findall(text) if name.lower() in _PYTHON]
    return blocks[-1] if blocks else None
