"""How a training tells of itself: a bar or plain lines, `metrics.jsonl`, TensorBoard, and the plan that waits for it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from koine.files import parse_json
from koine.terminal import plain_console
from koine.train.board import Board

PLAIN_EVERY = 10.0  # seconds between plain lines


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines of `step` and later ones (they are taken again), and a line that a kill cut short."""
    if not path.exists():
        return
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if parse_json(line.decode("utf-8"))["step"] >= step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line)
    whole = b"".join(kept)
    if whole and not whole.endswith(b"\n"):
        whole += b"\n"
    if whole != path.read_bytes():
        from koine.files import write_atomically

        write_atomically(path, whole)


class Reporter:
    """Writes what a step measured to every place that wants it. Rank 0 makes one; the others make none."""

    def __init__(self, out: Path, *, first_step: int, steps: int, progress: bool) -> None:
        self.steps = steps
        self.metrics = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self.board = Board(out / "tensorboard", first_step=first_step)
        self.bar: Any = None
        self.progress = progress
        self.last_line = 0.0
        self.begin = time.perf_counter()
        self.first_step = first_step
        self.report: Any = None
        if importlib.util.find_spec("koine.plan.run.progress") is not None:
            self.report = importlib.import_module("koine.plan.run.progress").report
        if progress and sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            self.bar = Progress(
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                console=plain_console(stderr=True),
                transient=True,
            )
            self.task = self.bar.add_task("", total=steps, completed=first_step)
            self.bar.start()

    def step(self, step: int, measured: dict[str, float]) -> None:
        """One optimiser step is done."""
        self._write(step, measured)
        done = step + 1
        left = (time.perf_counter() - self.begin) / (done - self.first_step) * (self.steps - done)
        share = measured.get("ceiling_share")
        text = (
            f"step {done}/{self.steps}  loss {measured['loss']:.3f}  {measured['tokens_per_second']:,.0f} tokens/s"
            + ("" if share is None else f"  {100 * share:.0f} % of the matmul ceiling")
            + f"  {_duration(left)} left"
        )
        if self.report is not None:
            self.report(done / self.steps, text)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=text)
        elif self.progress and (time.perf_counter() - self.last_line > PLAIN_EVERY or done == self.steps):
            self.last_line = time.perf_counter()
            print(text, file=sys.stderr, flush=True)

    def evaluation(self, step: int, measured: dict[str, float]) -> None:
        """An evaluation after `step` is done."""
        self._write(step, {f"evaluation/{name}": value for name, value in measured.items()})

    def say(self, text: str) -> None:
        """A line for the user."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        elif self.progress:
            print(text, file=sys.stderr, flush=True)

    def _write(self, step: int, measured: dict[str, float]) -> None:
        self.metrics.write(json.dumps({"step": step, **measured}) + "\n")
        self.metrics.flush()
        for name, value in measured.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.metrics.close()
        self.board.close()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
