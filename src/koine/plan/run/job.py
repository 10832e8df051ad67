"""The description of one step for the process that runs it, and the start of that process."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.plan.command_line import recorded_command
from koine.plan.plan import PLAN_FILE, Artifact, Node, Plan, handles, places
from koine.plan.run.progress import VARIABLE

HEADER = "=== "  # begins the line of each attempt in a log


@dataclass(frozen=True)
class Job:
    """Everything that a worker process needs, on this machine or on another with the same files."""

    folder: str  # of the run
    name: str
    fingerprint: str
    module: str
    file: str | None  # of the plan, where the module is one
    call: bytes  # pickled (function's name, inputs, parameters): read after the module is loaded
    identity: dict[str, Any]
    parents: tuple[dict[str, Any], ...]
    threads: int
    argv: tuple[str, ...]
    code: dict[str, Any]
    estimate: dict[str, Any] | None
    log: str
    progress: str
    python_path: tuple[str, ...]


def check_importable(function: Callable[..., None]) -> None:
    """Raise `UserError` unless another process can import the step."""
    if function.__module__ == "__main__" or "<" in function.__qualname__:
        raise UserError(
            "a step must be a function at the top level of a module",
            where=function.__qualname__,
            hint="define it in a file of its own or in the plan's file, and start it with `koine run`",
        )


def make_job(
    plan: Plan, node: Node, *, code: dict[str, Any], estimate: dict[str, Any] | None, progress: Path
) -> Job:
    """Return the job of one node."""
    check_importable(node.function)
    module = node.function.__module__
    file = sys.modules[module].__file__ if module.startswith(PLAN_FILE) else None
    parents: dict[str, Artifact] = {h.name: h for value in node.inputs.values() for h in handles(value)}
    return Job(
        folder=str(plan.folder.resolve()),
        name=node.artifact.name,
        fingerprint=node.artifact.fingerprint,
        module=module,
        file=file,
        call=pickle.dumps(
            (node.function.__qualname__, {k: places(v) for k, v in node.inputs.items()}, node.parameters)
        ),
        identity=node.identity,
        parents=tuple(
            {
                "name": name,
                "path": str(parent.path),
                "fingerprint": parent.fingerprint,
                "input": name in plan.inputs,
            }
            for name, parent in parents.items()
        ),
        threads=plan.threads_of(node.artifact.name),
        argv=tuple(recorded_command()),
        code=code,
        estimate=estimate,
        log=str(log_of(plan, node.artifact.name).resolve()),
        progress=str(progress),
        python_path=tuple(str(Path(path or ".").resolve()) for path in sys.path),
    )


def log_of(plan: Plan, name: str) -> Path:
    """Return the log file of one artifact."""
    return plan.folder / "logs" / f"{name}.log"


class Process:
    """A running worker process.

    Its standard input stays open while this process lives: when it closes, the worker's process group is
    killed.
    """

    def __init__(self, job: Job) -> None:
        log = Path(job.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), str(job.threads))
        environment = {
            **os.environ,
            **threads,
            "PYTHONPATH": os.pathsep.join(job.python_path),
            "PYTHONUNBUFFERED": "1",
            VARIABLE: job.progress,
        }
        # -P: a file in the current folder that is called like an installed module must not hide it.
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "koine.plan.run.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        content = pickle.dumps(job)
        assert self.process.stdin is not None
        with contextlib.suppress(
            BrokenPipeError
        ):  # it ended at once: poll() gives its code, its log the reason
            self.process.stdin.write(struct.pack("<Q", len(content)) + content)
            self.process.stdin.flush()

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        code = self.process.poll()
        if code is not None:
            self._close_input()
        return code

    def stop(self, number: int) -> None:
        """Pass a signal on, so that a training saves a checkpoint and ends."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the worker and all processes that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._close_input()

    def _close_input(self) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # the worker has ended already
                self.process.stdin.close()
