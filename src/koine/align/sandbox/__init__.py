"""Run untrusted programs against tests, in bubblewrap: only inputs go in, outputs are compared outside."""

from koine.align.sandbox.limits import Limits
from koine.align.sandbox.program_tests import ProgramTest, read_test
from koine.align.sandbox.sandbox import Sandbox, SandboxError, TestResult

__all__ = ["Limits", "ProgramTest", "Sandbox", "SandboxError", "TestResult", "read_test"]
