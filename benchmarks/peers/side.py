"""One side of a benchmark: a process in its own environment that answers commands, one JSON object a line."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any


class Side:
    """A process that has reported that it is ready. Raises `RuntimeError` with its last line where it ends."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process is)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            if self.process.returncode == -signal.SIGKILL:
                raise RuntimeError("ended by the operating system, which has no more memory")
            raise RuntimeError(f"the side ended with {self.process.returncode}: {lines[-1] if lines else ''}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, **values: int) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.wait()
