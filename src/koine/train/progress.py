"""Progress of a training: a bar or plain lines, `metrics.jsonl`, TensorBoard, and the plan's display."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from koine.data.cut_text import CUT_FIGURES
from koine.files import parse_json
from koine.plan.run.progress import report
from koine.terminal import is_quiet, plain_console
from koine.train.tensorboard import TensorBoardWriter
from koine.train.tracking.background import Tracking
from koine.train.tracking.run_logger import Outcome

LINE_SECONDS = 10.0  # between plain lines


def truncate_metrics(path: Path, step: int) -> None:
    """Remove the lines of `step` and later ones, and a line that a kill cut short."""
    if not path.exists():
        return
    lines: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if parse_json(line.decode("utf-8"))["step"] >= step:
                break
        except (ValueError, KeyError, TypeError):
            break
        lines.append(line)
    content = b"".join(lines)
    if content and not content.endswith(b"\n"):
        content += b"\n"
    if content != path.read_bytes():
        from koine.files import write_atomically

        write_atomically(path, content)


def final_metrics(path: Path) -> dict[str, float]:
    """Return the mean loss of the last ten steps, the last evaluation, and the shares of text cut off.

    path: a `metrics.jsonl`.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    metrics = {"loss": sum(losses[-10:]) / len(losses[-10:])}
    metrics |= {key: value for line in lines for key, value in line.items() if key.startswith(CUT_FIGURES)}
    for line in reversed(lines):
        found = {
            key.removeprefix("evaluation/"): value
            for key, value in line.items()
            if key.startswith("evaluation/")
        }
        if found:
            return metrics | found
    return metrics


class Reporter:
    """Writes the figures of each step; only the main rank has one."""

    def __init__(
        self, out: Path, *, first_step: int, steps: int, progress: bool, tracking: Tracking | None = None
    ) -> None:
        self.steps = steps
        self.tracking = tracking
        self.metrics = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard = TensorBoardWriter(out / "tensorboard", first_step=first_step)
        self.bar: Any = None
        progress = progress and not is_quiet()
        self.progress = progress
        self.last_line_time = 0.0
        self.begin = time.perf_counter()
        self.first_step = first_step
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

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of an optimiser step."""
        self._write(step, figures)
        steps_done = step + 1
        seconds_per_step = (time.perf_counter() - self.begin) / (steps_done - self.first_step)
        seconds_left = seconds_per_step * (self.steps - steps_done)
        share = figures.get("matmul_rate_share")
        text = (
            f"step {steps_done}/{self.steps}  loss {figures['loss']:.3f}"
            f"  {figures['tokens_per_second']:,.0f} tokens/s"
            + ("" if share is None else f"  {100 * share:.0f} % of the matmul rate")
            + f"  {_duration(seconds_left)} left"
        )
        report(steps_done / self.steps, text)
        if self.bar is not None:
            self.bar.update(self.task, completed=steps_done, description=text)
        elif self.progress and (
            time.perf_counter() - self.last_line_time > LINE_SECONDS or steps_done == self.steps
        ):
            self.last_line_time = time.perf_counter()
            print(text, file=sys.stderr, flush=True)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of an evaluation after `step`."""
        self._write(step, {f"evaluation/{name}": value for name, value in figures.items()})

    def print(self, text: str) -> None:
        """Print a line for the user."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False)
        elif self.progress:
            print(text, file=sys.stderr, flush=True)

    def _write(self, step: int, figures: dict[str, float]) -> None:
        self.metrics.write(json.dumps({"step": step, **figures}) + "\n")
        self.metrics.flush()
        for name, value in figures.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.tracking is not None:
            self.tracking.log(step, figures)

    def close(self, outcome: Outcome) -> None:
        """Close the files, the bar, and the tracker's run with how the training ended."""
        if self.bar is not None:
            self.bar.stop()
        self.metrics.close()
        self.tensorboard.close()
        if self.tracking is not None:
            self.tracking.finish(outcome)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
