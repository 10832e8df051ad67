"""`koine chat` in a real pseudo-terminal: what a person sees and what Ctrl-C does."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

WAIT_SECONDS = 40.0


class Terminal:
    """A program in a pseudo-terminal of its own session, so that Ctrl-C reaches it as from a keyboard."""

    def __init__(self, arguments: list[str]) -> None:
        self.process_id, self.descriptor = pty.fork()
        if self.process_id == 0:
            os.environ.update(TERM="dumb", LC_ALL="C.UTF-8", OMP_NUM_THREADS="1")
            os.execv(sys.executable, [sys.executable, "-m", "koine", *arguments])
        self.seen = b""
        self.mark = 0

    def read(self, seconds: float) -> bool:
        """Take in what the program has written; False at its end."""
        ready, _, _ = select.select([self.descriptor], [], [], seconds)
        if not ready:
            return True
        try:
            data = os.read(self.descriptor, 4096)
        except OSError:
            return False
        self.seen += data
        return bool(data)

    def expect(self, pattern: str) -> str:
        """Wait until `pattern` comes after what was expected before; the text up to and with it."""
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            text = self.seen[self.mark :].decode("utf-8", errors="ignore")
            if match := re.search(pattern, text):
                taken = text[: match.end()]
                self.mark += len(taken.encode())
                return taken
            if not self.read(0.2):
                break
        raise AssertionError(f"never saw {pattern!r} in {self.seen[self.mark :][-2000:]!r}")

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def interrupted_to_the_end(self) -> int:
        """Press Ctrl-C every eight seconds until the program ends: one between the prompt and readline's wait is
        noticed only at the next key, which is Python's own behaviour."""
        for _ in range(6):
            self.type("\x03")
            try:
                return self.exit_code(seconds=8.0)
            except AssertionError:
                continue
        raise AssertionError("Ctrl-C did not end the program")

    def exit_code(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            process_id, status = os.waitpid(self.process_id, os.WNOHANG)
            if process_id:
                self.process_id = 0
                return os.waitstatus_to_exitcode(status)
            self.read(0.1)
        raise AssertionError("the program did not end")

    def close(self) -> None:
        if self.process_id:
            os.kill(self.process_id, signal.SIGKILL)
            os.waitpid(self.process_id, 0)
        os.close(self.descriptor)


@pytest.fixture
def terminal(model_folder: Path) -> Iterator[Terminal]:
    """A chat with a model of random weights that gives no stop token within a few thousand tokens."""
    opened = Terminal(
        [
            "chat",
            str(model_folder),
            "--temperature",
            "1",
            "--seed",
            "3",
            "--max-new-tokens",
            "8",
            "--threads",
            "1",
        ]
    )
    yield opened
    opened.close()


def test_a_session_with_ctrl_c(terminal: Terminal) -> None:
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.type("hello\r")
    assert "tokens/s, first after" in terminal.expect(r"\[\d+ tokens.*\]")
    terminal.expect("> ")
    # greedy, these weights go round in a circle and never end by themselves
    terminal.type("/set temperature 0\r")
    terminal.expect("> ")
    terminal.type("/set max-new-tokens 100000\r")
    terminal.expect(r"max-new-tokens 100000\)")
    terminal.expect("> ")
    terminal.type("go on\r")
    terminal.expect(r"go on\r\n[^\r\n]")
    terminal.type("\x03")
    terminal.expect(r"stopped\]")
    terminal.expect("> ")
    # the program goes on, and the history with it
    terminal.type("/set max-new-tokens 4\r")
    terminal.expect("> ")
    terminal.type("again\r")
    terminal.expect(r"\[4 tokens.*cut at max-new-tokens\]")
    terminal.expect("> ")
    terminal.type("/rest\r")
    terminal.expect(r"unknown command '/rest'; did you mean '/reset'")
    terminal.expect("> ")
    assert terminal.interrupted_to_the_end() == 0
    assert b"Ctrl-C again, /quit or Ctrl-D leaves" in terminal.seen


def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_a_pipe_gets_replies_only(model_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "koine",
        "chat",
        str(model_folder),
        "--seed",
        "3",
        "--max-new-tokens",
        "5",
    ]
    process = subprocess.run(
        command,
        input="Hello\n/reset\nκόσμε\n".encode(),
        capture_output=True,
        timeout=WAIT_SECONDS,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    process.stdout.decode("utf-8")
    once = subprocess.run(
        [*command, "--once", "Hello"],
        capture_output=True,
        timeout=WAIT_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    # the same seed and question: the same answer
    assert once.stdout
    assert process.stdout.startswith(once.stdout)
    assert b"tokens/s" in once.stderr
