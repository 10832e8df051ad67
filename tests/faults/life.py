"""Run a command in a fork of a process that has imported everything, which is fast."""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.interpose import Control, attach

Action = Sequence[str] | Callable[[], None]
"""The words after `koine`, or a function."""


@dataclass
class Life:
    """The end of a command. code: its exit code, negative for a signal. late: it had to be ended."""

    code: int
    out: str
    err: str
    late: bool
    reached: bool
    calls: int
    seconds: float
    peak_bytes: int


def adopt_orphans() -> None:
    """Become the parent of a killed command's children, to wait for their end."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


class Running:
    """A command that has been started."""

    def __init__(
        self, action: Action, work: Path, aside: Path, control: Control, *, limits: dict[int, int]
    ) -> None:
        aside.mkdir(parents=True, exist_ok=True)
        (aside / "tmp").mkdir(exist_ok=True)
        self.aside, self.control, self.begun = aside, control, time.monotonic()
        self.ended: int | None = None
        self.peak_bytes = 0
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if not self.process:
            _live(action, work, aside, control, limits)
        self.descriptor = os.pidfd_open(self.process)

    def poll(self, seconds: float) -> bool:
        """Wait at most so long for the end; True where it has come."""
        if self.ended is None and select.select([self.descriptor], [], [], max(0.0, seconds))[0]:
            _, status, usage = os.wait4(self.process, 0)
            self.ended = os.waitstatus_to_exitcode(status)
            self.peak_bytes = usage.ru_maxrss * 1024
            os.close(self.descriptor)
        return self.ended is not None

    def stopped(self, seconds: float) -> bool:
        """Wait until the command waits at its call; False where it ends before that."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.control.get("stopped"):
                return True
            if self.poll(0.002):
                return False
        return False

    def end(self, seconds: float) -> Life:
        """Wait for the end, and end what is late or has been left behind."""
        late = not self.poll(seconds)
        # A command that has ended in good order leaves no process; one that was killed may.
        left = set(self.control.processes()) if late or self.ended else set()
        for process in (left | {self.process}) if self.ended is None else (left - {self.process}):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.poll(30.0)
        self._reap()
        assert self.ended is not None
        return Life(
            code=self.ended,
            out=(self.aside / "out").read_text(errors="replace"),
            err=(self.aside / "err").read_text(errors="replace"),
            late=late,
            reached=bool(self.control.get("reached")),
            calls=self.control.get("count"),
            seconds=time.monotonic() - self.begun,
            peak_bytes=self.peak_bytes,
        )

    def _reap(self) -> None:
        own = set(self.control.processes())
        until = time.monotonic() + 10.0
        while own and time.monotonic() < until:
            for process in list(own):
                try:
                    if os.waitpid(process, os.WNOHANG)[0]:
                        own.discard(process)
                except ChildProcessError:
                    if not Path(f"/proc/{process}").exists():
                        own.discard(process)
            time.sleep(0.001)


def live(
    action: Action, work: Path, aside: Path, *, seconds: float, log: Path | None = None,
    limits: dict[int, int] | None = None, **numbers: int,
) -> Life:  # fmt: skip
    """Run a command in `work` to its end. aside: folder for its output, errors and temporary files."""
    aside.mkdir(parents=True, exist_ok=True)
    control = Control(aside / "control", root=work, log=log, **numbers)
    try:
        return Running(action, work, aside, control, limits=limits or {}).end(seconds)
    finally:
        control.close()


def _live(action: Action, work: Path, aside: Path, control: Control, limits: dict[int, int]) -> None:
    """Run the forked child. Never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(work)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(aside / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
            os.close(file)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")
        os.environ["TMPDIR"] = str(aside / "tmp")
        import tempfile

        tempfile.tempdir = None
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for which, most in limits.items():
            resource.setrlimit(which, (most, most))
        attach(control.path)
        code = _act(action)
    except BaseException:  # noqa: BLE001 - as the interpreter does: a traceback, and exit code 1
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError as error:
            if error.errno != errno.EPIPE:
                traceback.print_exc()
        os._exit(code)


def _act(action: Action) -> int:
    """Run the command as its own process would; return its exit code."""
    try:
        if callable(action):
            action()
        else:
            from koine.cli.main import main

            sys.argv = ["koine", *action]
            main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return error.code or 0
    except BaseException:  # noqa: BLE001 - as the interpreter does: a traceback, and exit code 1
        traceback.print_exc()
        return 1
    return 0
