"""Run a plan: build what is missing or changed, independent steps side by side."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from koine.errors import UserError
from koine.files import clear_abandoned, disk_errors, exclusive
from koine.plan.formatting import size
from koine.plan.plan import Node, Plan
from koine.plan.run.checks import check_room, check_run_folder, check_steps
from koine.plan.run.display import Display
from koine.plan.run.estimates import Expectation, expect, remaining
from koine.plan.run.job import HEADER, Job, check_importable, log_of, make_job
from koine.plan.run.progress import read_progress
from koine.plan.run.time_left import RunProgress, StepProgress
from koine.plan.store.export import exports_lock, write_exports
from koine.plan.store.provenance import code_version
from koine.plan.store.publish import leftovers, lock_of, recover
from koine.plan.store.run_record import RunRecord
from koine.plan.store.status import Status, statuses

POLL_SECONDS = 0.05
# A training that is asked to stop writes a checkpoint first; after this time it is killed.
GRACE_SECONDS = 120.0
OVERALL_EVERY_SECONDS = 0.5


class Running(Protocol):
    """A step that an executor has started."""

    def poll(self) -> int | None: ...
    def stop(self, number: int) -> None: ...
    def kill(self) -> None: ...


class Executor(Protocol):
    """The place where steps run. `free_memory` is in bytes; None where the executor manages memory itself."""

    cores: int
    free_memory: int | None

    def start(self, job: Job) -> Running: ...


@dataclass(frozen=True)
class Failure:
    """A failed step: exit code, log, the log's last lines, and the error if the worker could report it."""

    name: str
    code: int
    log: Path
    lines: tuple[str, ...]
    error: str | None = None

    @property
    def message(self) -> str:
        """One line: the step, its log, and the error."""
        if self.error is not None:
            reason = self.error
        elif self.code < 0:
            reason = f"killed by {signal.Signals(-self.code).name}" + (
                ", perhaps out of memory" if self.code == -signal.SIGKILL else ""
            )
        else:
            reason = self.lines[-1].removeprefix("koine: ") if self.lines else f"exit code {self.code}"
        return f"step '{self.name}' failed (log: {self.log}): {reason}"


def last_lines(log: Path, count: int = 12) -> tuple[str, ...]:
    """Return the last lines of the latest attempt in a log."""
    text = "\n" + log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    _, header, latest = text.rpartition("\n" + HEADER)
    if header:
        latest = latest.partition("\n")[2]
    return tuple(latest.strip().splitlines()[-count:])


class PlanFailedError(Exception):
    """Steps failed; `exit_code` is 2 if every failure is a mistake of the user, else 1."""

    def __init__(self, failures: list[Failure]) -> None:
        self.failures = failures
        self.exit_code = 2 if all(failure.code == 2 for failure in failures) else 1
        super().__init__("; ".join(failure.message for failure in failures))


class RunInterruptedError(Exception):
    """A signal stopped the run; running it again continues from there."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("interrupted; run the same command again to continue")


@dataclass
class Interrupt:
    """Signals that asked the run to stop: the first one, their count, and the time of the first."""

    number: int | None = None
    count: int = 0
    since: float = field(default=0.0)

    def __call__(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        self.count += 1
        if self.number is None:
            self.number, self.since = number, time.monotonic()


@contextmanager
def interrupts() -> Iterator[Interrupt]:
    """Record SIGINT and SIGTERM instead of ending the process; does nothing outside the main thread."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def remove_dead_progress(folder: Path) -> None:
    """Remove the progress files of killed runs of this machine."""
    import psutil

    for left in folder.glob(f"{platform.node()}-*"):
        number = left.name.removeprefix(f"{platform.node()}-")
        if number.isdecimal() and left.is_dir() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def make_progress_folder(own: Path) -> None:
    """Make the folder where running steps write their progress.

    If a file is in its way, no progress is shown.
    """
    shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(FileExistsError, NotADirectoryError):
        own.mkdir(parents=True)


def recover_all(plan: Plan) -> None:
    """Repair artifacts whose publication was killed, unless another run is building them now."""
    for name in plan.nodes:
        # A lock file that nobody holds was left by a kill. A lock that is held is waited for later, where the
        # artifact is needed.
        if leftovers(plan.folder, name) or lock_of(plan.folder, name).exists():
            with (
                contextlib.suppress(UserError),
                exclusive(lock_of(plan.folder, name), doing=f"building {name}"),
            ):
                recover(plan.folder, name)


@dataclass
class _Run:
    plan: Plan
    executor: Executor
    display: Display
    record: RunRecord
    expectation: Expectation
    progress_folder: Path  # where running steps write their progress
    waiting: dict[str, Node]
    running: dict[str, Running] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)  # failed, or not run because an input failed
    whole: RunProgress = field(init=False)
    overall_shown: float = field(default=float("-inf"), init=False)  # on the monotonic clock

    def __post_init__(self) -> None:
        estimates = self.expectation.steps
        self.whole = RunProgress(
            {
                name: StepProgress(
                    function=str(node.identity["step"]),
                    expected=estimates[name].seconds if name in estimates else None,
                    parents=node.parents,
                    cores=self.needs(name)[0],
                    memory=self.needs(name)[1],
                )
                for name, node in self.waiting.items()
            },
            cores=self.executor.cores,
            memory=self.executor.free_memory,
        )

    def show_overall(self) -> None:
        """Show the state of the whole run, a few times a second."""
        now = time.monotonic()
        if self.whole.steps and now - self.overall_shown >= OVERALL_EVERY_SECONDS:
            self.overall_shown = now
            self.display.overall(self.whole.overall())

    def end(self, name: str, status: str, what: str) -> None:
        """Record and show that a step has ended."""
        self.record.set(name, status)
        self.whole.end(name, measured=status == "built")
        self.display.finished(name, what, self.whole.overall())

    def needs(self, name: str) -> tuple[int, int]:
        """Return the cores and bytes that a step needs; at most the executor's cores."""
        estimate = self.expectation.steps.get(name)
        cores = min(self.plan.threads_of(name), self.executor.cores)
        return cores, 0 if estimate is None else estimate.memory_bytes

    def fits(self, name: str) -> bool:
        """Return whether a step can start beside the running ones; a single step always can."""
        if not self.running:
            return True
        needs = [self.needs(other) for other in [*self.running, name]]
        if sum(cores for cores, _ in needs) > self.executor.cores:
            return False
        free = self.executor.free_memory
        return free is None or sum(memory for _, memory in needs) <= free

    def start_ready(self, statuses: dict[str, Status], code: dict[str, Any]) -> None:
        for name, node in list(self.waiting.items()):
            if any(parent in self.lost for parent in node.parents):
                del self.waiting[name]
                self.lost.add(name)
                self.record.set(name, "not run")
                self.whole.end(name, measured=False)
                self.display.line(f"{name}: not run, an input failed")
            elif any(parent in self.waiting or parent in self.running for parent in node.parents):
                continue
            elif self.fits(name):
                del self.waiting[name]
                memory, free = self.needs(name)[1], self.executor.free_memory
                if free is not None and memory > free:
                    self.display.line(f"{name}: may need {size(memory)}, and {size(free)} are free")
                estimate = self.expectation.record(name)
                job = make_job(
                    self.plan,
                    node,
                    code=code,
                    estimate=estimate,
                    progress=self.progress_folder / name.replace("/", "+"),
                )
                self.running[name] = self.executor.start(job)
                self.record.set(name, "running")
                self.whole.start(name)
                self.display.started(name, "; ".join(statuses[name].reasons))

    def poll(self, interrupted: bool) -> None:
        """Show progress, and record the steps that have ended."""
        for name, process in list(self.running.items()):
            code = process.poll()
            progress = read_progress(self.progress_folder / name.replace("/", "+"))
            if code is None:
                if "fraction" in progress and "result" not in progress:
                    self.whole.report(name, progress["fraction"])
                    self.display.progress(name, progress["fraction"], progress["text"])
                continue
            del self.running[name]
            if code == 0:
                result = str(progress.get("result", "built"))
                self.end(name, result, "reused (another run built it)" if result == "reused" else "done")
            elif interrupted:
                self.end(name, "interrupted", "stopped")
            else:
                self.lost.add(name)
                log = log_of(self.plan, name)
                self.failures.append(Failure(name, code, log, last_lines(log), progress.get("error")))
                self.end(name, "failed", "failed")

    def drive(self, statuses: dict[str, Status]) -> None:
        """Run until every step has ended, or until a signal came and the running steps have stopped."""
        code = code_version() if self.waiting else {}
        forwarded = 0
        with self.display, interrupts() as interrupt:
            try:
                while self.running or (self.waiting and interrupt.number is None):
                    if interrupt.number is None:
                        self.start_ready(statuses, code)
                    self.poll(interrupt.number is not None)
                    self.show_overall()
                    if interrupt.number is not None:
                        if forwarded == 0 and self.running:
                            self.display.line("stopping; once more to stop at once")
                            for process in self.running.values():
                                process.stop(interrupt.number)
                        forwarded = 1
                        if interrupt.count > 1 or time.monotonic() - interrupt.since > GRACE_SECONDS:
                            for process in self.running.values():
                                process.kill()
                    if self.running:
                        time.sleep(POLL_SECONDS)
            finally:
                for process in self.running.values():
                    process.kill()
        if interrupt.number is not None:
            self.record.end("interrupted")
            raise RunInterruptedError(interrupt.number)


def execute(
    plan: Plan, *, executor: Executor | None = None, display: Display | None = None
) -> dict[str, dict[str, Any]]:
    """Build what is missing or changed, and return the nodes of `plan.json`.

    Steps that do not depend on a failed one still run.

    Raises:
        PlanFailedError: steps failed; everything that succeeded stays.
        RunInterruptedError: SIGINT or SIGTERM; running steps got the signal, and had time to save.
        UserError: a mistake that a step's check finds before anything runs, a run's folder that cannot be
            written, or a disk without room.
    """
    from koine.plan.run.local import LocalExecutor

    check_run_folder(plan.folder)
    recover_all(plan)
    found = statuses(plan)
    build = {name: plan.nodes[name] for name, status in found.items() if status.state == "build"}
    for node in build.values():
        check_importable(node.function)
    expectation = expect(plan, build, check_steps(plan, found))
    check_room(plan, expectation)
    folder = plan.folder.resolve()
    own = folder / ".progress" / f"{platform.node()}-{os.getpid()}"
    with disk_errors(plan.folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Another run that writes its exports now has temporary files there.
        with exports_lock(folder):
            clear_abandoned(folder, folder / ".cache", folder / ".work")
        remove_dead_progress(own.parent)
        make_progress_folder(own)
        try:
            record = RunRecord(plan, found, expectation)
            record.write()
            plan.cache.save()
            after = remaining(plan, {name: estimate.seconds for name, estimate in expectation.steps.items()})
            # Of the steps that could start, the one with the longest remaining chain goes first.
            build = dict(sorted(build.items(), key=lambda item: -after[item[0]]))
            run = _Run(
                plan, executor or LocalExecutor(), display or Display(), record, expectation, own, dict(build)
            )
            run.drive(found)
            if run.failures:
                record.end("failed")
                raise PlanFailedError(run.failures)
            write_exports(plan)
            record.end("succeeded")
        finally:
            shutil.rmtree(own, ignore_errors=True)
    return record.nodes
