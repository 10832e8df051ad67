"""Live bars of a run on a terminal: one for each running step, and one for the whole run below them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Column

from koine.plan.formatting import time_left
from koine.plan.run.time_left import Overall

if TYPE_CHECKING:
    from rich.console import Console

WIDE_COLUMNS = 110
"""Width of a terminal from which bars are long; the texts of steps need the rest."""
REFRESHES_PER_SECOND = 8


class LiveBars:
    """The bars at the bottom of a terminal; they vanish when the run ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.steps = bars(console, expand=True)
        self.whole = bars(console, expand=False)
        self.tasks: dict[str, TaskID] = {}
        self.run: TaskID | None = None
        self.live = Live(
            Group(self.steps, self.whole),
            console=console,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )

    def start(self) -> None:
        """Begin to draw."""
        self.live.start()

    def stop(self) -> None:
        """Remove the bars."""
        self.live.stop()

    def line(self, text: str) -> None:
        """Print one line that stays above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def add(self, name: str) -> None:
        """Add the bar of a step."""
        self.tasks[name] = self.steps.add_task(name, total=1.0, text="")

    def update(self, name: str, fraction: float, text: str) -> None:
        """Move the bar of a step, and set the text behind it."""
        self.steps.update(self.tasks[name], completed=fraction, text=text)

    def remove(self, name: str) -> None:
        """Remove the bar of a step that has ended."""
        self.steps.remove_task(self.tasks.pop(name))

    def overall(self, state: Overall) -> None:
        """Move the bar of the whole run."""
        if self.run is None:
            self.run = self.whole.add_task("", total=1.0, text="")
        self.whole.update(
            self.run,
            description=f"step {state.step} of {state.steps}",
            completed=state.fraction,
            text="" if state.seconds_left is None else time_left(state.seconds_left),
        )


def bars(console: Console, *, expand: bool) -> Progress:
    """Return an empty list of bars; `expand`: their texts take the rest of the line, and are cut there."""
    bar = 24 if console.width >= WIDE_COLUMNS else 10
    return Progress(
        TextColumn(
            "{task.description}", markup=False, table_column=one_line(max_width=console.width * 2 // 5)
        ),
        BarColumn(bar_width=bar, table_column=Column(width=bar)),
        TaskProgressColumn(table_column=Column(width=4)),
        TimeElapsedColumn(table_column=Column(width=7)),
        TextColumn("{task.fields[text]}", markup=False, table_column=one_line(ratio=1 if expand else None)),
        console=console,
        expand=expand,
    )


def one_line(*, max_width: int | None = None, ratio: int | None = None) -> Column:
    """Return a column whose text is cut, never wrapped."""
    return Column(no_wrap=True, overflow="ellipsis", max_width=max_width, ratio=ratio)
