"""Runs a plan's steps as processes of this machine, independent ones side by side."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.plan.plan import Artifact, Node, Plan, why
from koine.plan.progress import VARIABLE


class StepFailedError(Exception):
    """A step crashed; the message names it, its log and the last line."""


def places(value: Any) -> Any:
    """An input with every handle replaced by its path."""
    if isinstance(value, Artifact):
        return value.place
    if isinstance(value, dict):
        return {key: places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [places(item) for item in value]
    return value


def start(plan: Plan, node: Node, log: Path) -> subprocess.Popen[bytes]:
    """Start the worker of one step."""
    if importlib.import_module(node.function.__module__).__name__ == "__main__":
        raise UserError("a step must live in an importable module", where=node.function.__qualname__)
    threads = str(node.info.threads)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), threads),
        "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
        "PYTHONUNBUFFERED": "1",
        VARIABLE: str(log.with_suffix(".progress")),
    }
    job = {
        "folder": str(plan.folder.resolve()), "name": node.artifact.name, "function": node.function,
        "fingerprint": node.artifact.fingerprint, "inputs": places(node.inputs), "parameters": node.parameters,
        "recipe": node.recipe, "threads": node.info.threads, "argv": sys.argv,
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "koine.plan.worker", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(job))
    process.stdin.close()
    return process


def execute(plan: Plan, *, say: Callable[[str], None] = print, cores: int | None = None) -> None:
    """Build what is missing or changed. Independent branches of a failed step go on to their end.

    Raises `UserError` where a step raised one, `StepFailedError` where one crashed.
    """
    free = cores or len(os.sched_getaffinity(0))
    total = free
    waiting = {name: node for name, node in plan.nodes.items() if why(node)}
    for name in plan.nodes.keys() - waiting.keys():
        say(f"{name}: up to date")
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    failed: dict[str, int] = {}
    stopped = False

    def stop(signum: int, frame: Any) -> None:
        nonlocal stopped
        stopped = True
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not stopped):
            for name, node in list(waiting.items()):
                if stopped or any(parent in waiting or parent in running for parent in node.parents):
                    continue
                if any(parent in failed for parent in node.parents):
                    failed[waiting.pop(name).artifact.name] = -1
                    say(f"{name}: not run, an input failed")
                elif min(node.info.threads, total) <= free:
                    del waiting[name]
                    free -= min(node.info.threads, total)
                    say(f"{name}: started")
                    running[name] = (start(plan, node, log_of(plan, name)), time.monotonic())
            for name, (process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    free += min(plan.nodes[name].info.threads, total)
                    if process.returncode:
                        failed[name] = process.returncode
                    took = time.monotonic() - began
                    say(f"{name}: {'failed' if process.returncode else 'done'} after {took:.1f} s")
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process, _ in running.values():
            process.kill()
            process.wait()
    if stopped:
        raise KeyboardInterrupt
    for name, code in failed.items():
        if code != -1:
            log = log_of(plan, name)
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            message = f"step '{name}' failed (log: {log}): {lines[-1].removeprefix('koine: ')}"
            raise UserError(message) if code == 2 else StepFailedError(message)


def log_of(plan: Plan, name: str) -> Path:
    """The log of one artifact."""
    return plan.folder / "logs" / f"{name}.log"
