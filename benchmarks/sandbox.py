"""Speed of the sandbox for unit tests: programs of four tests a second.

    python benchmarks/sandbox.py

Aim: at least 20 programs a second on two cores. The programs are short functions, so the start of the sandbox
and of its processes is what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import time

from koine.align.sandbox import Sandbox, SandboxError, read_test

SOLUTION = "def f(x):\n    return x * x\n"
TESTS = [read_test(f"assert f({x}) == {x * x}") for x in (2, 3, 5, 7)]


def main() -> None:
    """Print programs a second of each repetition as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    sandbox = Sandbox()
    sandbox.check()
    rates = []
    for _ in range(arguments.repetitions):
        begin = time.perf_counter()
        results = sandbox.run_all([(SOLUTION, TESTS)] * arguments.programs, arguments.workers)
        rates.append(arguments.programs / (time.perf_counter() - begin))
        for result in results:
            if isinstance(result, SandboxError) or not all(test.passed for test in result):
                raise SystemExit(f"a right program did not pass: {result}")
    figures = {
        "workers": arguments.workers,
        "programs_per_second": [round(rate, 1) for rate in rates],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
