"""Show the progress of a run: live bars on a terminal, plain lines every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from koine.plan.formatting import duration
from koine.terminal import is_quiet, plain_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_EVERY_SECONDS = 5.0


class Display:
    """Prints the state of the steps on standard output; a context manager, entered while steps run."""

    def __init__(self) -> None:
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, float] = {}
        self.shown: dict[str, tuple[float, Any]] = {}

    def __enter__(self) -> Display:
        if sys.stdout.isatty() and not is_quiet():
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
            from rich.table import Column

            self.bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn(
                    "{task.fields[text]}",
                    markup=False,
                    table_column=Column(no_wrap=True, overflow="ellipsis"),
                ),
                console=plain_console(),
                transient=True,
                refresh_per_second=8,
            )
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def line(self, text: str) -> None:
        """Print one line that stays above the bars; nothing under `--quiet`."""
        if is_quiet():
            return
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def started(self, name: str, why: str) -> None:
        """Show that a step has started."""
        self.began[name] = time.monotonic()
        self.shown[name] = (time.monotonic(), None)
        if self.bars is not None:
            self.tasks[name] = self.bars.add_task(name, total=1.0, text="")
        else:
            self.line(f"{name}: started ({why})")

    def progress(self, name: str, fraction: float, text: str) -> None:
        """Show the progress of a running step."""
        if self.bars is not None:
            self.bars.update(self.tasks[name], completed=fraction, text=text)
            return
        now = time.monotonic()
        last, before = self.shown[name]
        if (fraction, text) != before and (before is None or now - last >= PLAIN_EVERY_SECONDS):
            if before is None and not text.startswith("waiting") and now - last < PLAIN_EVERY_SECONDS:
                return
            self.shown[name] = (now, (fraction, text))
            self.line(
                f"{name}: {100 * fraction:3.0f} % after {duration(now - self.began[name])}  {text}".rstrip()
            )

    def finished(self, name: str, what: str) -> None:
        """Show that a step has ended."""
        took = duration(time.monotonic() - self.began.pop(name))
        if self.bars is not None:
            self.bars.remove_task(self.tasks.pop(name))
        self.line(f"{name}: {what} after {took}")
