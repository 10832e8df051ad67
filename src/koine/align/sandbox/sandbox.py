"""Run programs against tests in bubblewrap, and compare their outputs outside."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any, Literal

from koine.align.sandbox import bubblewrap
from koine.align.sandbox.limits import Limits
from koine.align.sandbox.program_tests import ProgramTest
from koine.align.sandbox.seccomp import filter_program

Status = Literal["passed", "wrong", "failed", "time", "output", "lost"]
_STATUSES: dict[str, Status] = {"failed": "failed", "time": "time", "output": "output"}
START_SECONDS = 20.0
"""Time that the sandbox itself may take to start, on a busy machine."""
END_SECONDS = 2.0
"""Time that bubblewrap may take to end by itself once its output has ended."""
_ESCAPED = 6
"""Longest form of one byte in JSON (`\\u0000`)."""


class SandboxError(Exception):
    """The sandbox itself failed in a run: nothing is known about the program."""


@dataclass(frozen=True)
class TestResult:
    """How one test of a program ended.

    status: `passed`; `wrong` output; `failed` (an error, a signal, an exit code other than 0); over its `time`
        or its `output`; `lost` (the program ended the run before this test).
    """

    status: Status

    __test__ = False  # pytest: this is no test

    @property
    def passed(self) -> bool:
        """Whether the output was the expected one."""
        return self.status == "passed"


class Sandbox:
    """Runs programs in bubblewrap. `check` raises `UserError` where this machine cannot."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()

    def check(self) -> None:
        """Start the sandbox once; raise `UserError` with how to mend it where it does not start."""
        _probe(self.limits)

    def run(self, source: str, tests: Sequence[ProgramTest]) -> list[TestResult]:
        """Run a program once for each test, each time in a fresh process; return the results in order.

        Raises:
            UserError: The sandbox does not start.
            SandboxError: It did not answer.
        """
        job = {"source": source, "tests": [test.job() for test in tests], "limits": self.limits.as_json()}
        answers = self._answers(job, len(tests))
        results = [_result(test, answer) for test, answer in zip(tests, answers, strict=False)]
        return results + [TestResult("lost")] * (len(tests) - len(results))

    def run_all(
        self, programs: Sequence[tuple[str, Sequence[ProgramTest]]], workers: int | None = None
    ) -> list[list[TestResult] | SandboxError]:
        """Run several programs at a time; a program whose sandbox failed has the error in its place.

        workers: sandboxes at a time; None for one a processor core.
        """

        def one(program: tuple[str, Sequence[ProgramTest]]) -> list[TestResult] | SandboxError:
            try:
                return self.run(*program)
            except SandboxError as error:
                return error

        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(one, programs))

    def _answers(self, job: dict[str, Any], count: int) -> list[dict[str, Any]]:
        """Return what the runner wrote about each test; fewer than `count` where the program stopped it."""
        per_test = _ESCAPED * self.limits.output_bytes + 4096
        with _input_file(ascii(job).encode()) as stdin, tempfile.TemporaryFile() as errors:
            lines, is_late = _communicate(
                self.limits,
                stdin,
                errors,
                seconds=1.0 + count * (self.limits.seconds + 1.0),
                most_bytes=4096 + count * per_test,
            )
            if not lines or lines[0] != {"ready": True}:
                if is_late:
                    raise SandboxError("the sandbox did not start in time")
                errors.seek(0)
                raise bubblewrap.startup_error(errors.read(4096).decode("utf-8", "replace"))
        return lines[1:]


@functools.cache
def _probe(limits: Limits) -> None:
    answers = Sandbox(limits)._answers(
        {"source": "x = 1", "tests": [{"expression": "x"}], "limits": limits.as_json()}, 1
    )
    if answers != [{"status": "ok", "output": '{"int": "1"}'}]:
        raise bubblewrap.startup_error(f"its test gives {answers}")


@functools.cache
def _runner() -> str:
    return resources.files("koine.align.sandbox").joinpath("runner.py").read_text(encoding="utf-8")


def _result(test: ProgramTest, answer: dict[str, Any]) -> TestResult:
    """Compare the output of one test; this is the only place that knows the expected one."""
    status, output = answer.get("status"), answer.get("output")
    if status == "ok" and isinstance(output, str):
        return TestResult("passed" if test.passes(output) else "wrong")
    return TestResult(_STATUSES.get(str(status), "failed"))


@contextlib.contextmanager
def _input_file(data: bytes) -> Any:
    """Yield a file without a name that holds `data`, at its beginning."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        yield file


def _communicate(
    limits: Limits, stdin: IO[bytes], errors: IO[bytes], *, seconds: float, most_bytes: int
) -> tuple[list[dict[str, Any]], bool]:
    """Start the sandbox; return the lines it wrote, and whether it was killed for its time or its output."""
    options: dict[str, Any] = {}
    if os.geteuid() == 0:
        options = {"user": bubblewrap.NOBODY, "group": bubblewrap.NOBODY, "extra_groups": []}
    with contextlib.ExitStack() as stack:
        program = filter_program()
        seccomp = None
        if program is not None:
            seccomp = stack.enter_context(_input_file(program)).fileno()
            options["pass_fds"] = (seccomp,)
        # -S, -s, -B: no site-packages and no compiled files; a program sees the standard library alone.
        line = [*bubblewrap.command(limits, seccomp), "-S", "-s", "-B", "-c", _runner()]
        process = subprocess.Popen(
            line,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd="/",
            start_new_session=True,
            **options,
        )
        try:
            assert process.stdout is not None
            output, is_late = _read(process.stdout, seconds, most_bytes)
            if not is_late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(END_SECONDS)
        finally:
            process.kill()  # bubblewrap's first process dies with it, and all processes of the namespace
            process.wait()
    return _json_lines(output), is_late


def _read(stream: IO[bytes], seconds: float, most_bytes: int) -> tuple[bytes, bool]:
    """Read until the end of the stream; return what came, and whether a limit ended it.

    seconds: from the first byte, which is written before the program runs.
    """
    deadline = time.monotonic() + START_SECONDS
    parts: list[bytes] = []
    size = 0
    with stream, selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and size <= most_bytes:
            if selector.select(left):
                part = os.read(stream.fileno(), 1 << 16)
                if not part:
                    return b"".join(parts), False
                if not parts:
                    deadline = time.monotonic() + seconds
                parts.append(part)
                size += len(part)
    return b"".join(parts), True


def _json_lines(output: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of the complete lines, up to the first line that is none."""
    found: list[dict[str, Any]] = []
    for line in output.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return found
