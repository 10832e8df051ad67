"""Show the progress of a run: live bars on a terminal, one plain line a step elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from koine.plan.formatting import duration, time_left
from koine.terminal import plain_console

if TYPE_CHECKING:
    from koine.plan.run.live_bars import LiveBars
    from koine.plan.run.time_left import Overall

QUIET_SECONDS = 60.0
"""Time without a line, outside a terminal, after which one says what is running."""


class Display:
    """Prints the state of the steps on standard output; a context manager, entered while steps run."""

    def __init__(self) -> None:
        self.bars: LiveBars | None = None
        self.began: dict[str, float] = {}
        self.reasons: dict[str, str] = {}
        self.fractions: dict[str, float] = {}
        self.waiting: set[str] = set()
        self.last_overall: Overall | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> Display:
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            from koine.plan.run.live_bars import LiveBars

            self.bars = LiveBars(plain_console())
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def line(self, text: str) -> None:
        """Print one line that stays above the bars."""
        self.last_line = time.monotonic()
        if self.bars is not None:
            self.bars.line(text)
        else:
            print(text, flush=True)

    def overall(self, state: Overall) -> None:
        """Show the state of the whole run; without a terminal at the start, and after a minute without a line."""
        first, self.last_overall = self.last_overall is None, state
        if self.bars is not None:
            self.bars.overall(state)
        elif first:
            self.line(f"{counted(state.steps)} to run{self.time_left()}")
        elif self.fractions and time.monotonic() - self.last_line >= QUIET_SECONDS:
            running = ", ".join(
                f"{name} {100 * fraction:.0f} % after {duration(time.monotonic() - self.began[name])}"
                for name, fraction in self.fractions.items()
            )
            self.line(f"running: {running}{self.time_left()}")

    def started(self, name: str, why: str) -> None:
        """Show that a step has started."""
        self.began[name], self.reasons[name], self.fractions[name] = time.monotonic(), why, 0.0
        if self.bars is not None:
            self.bars.add(name)

    def progress(self, name: str, fraction: float, text: str) -> None:
        """Show the progress of a running step."""
        self.fractions[name] = fraction
        if self.bars is not None:
            self.bars.update(name, fraction, text)
        elif text.startswith("waiting") and name not in self.waiting:
            self.waiting.add(name)
            self.line(f"{name}: {text}")

    def finished(self, name: str, what: str, state: Overall) -> None:
        """Show that a step has ended.

        state: of the whole run, with this step among those that have ended.
        """
        took = duration(time.monotonic() - self.began.pop(name))
        why = self.reasons.pop(name)
        del self.fractions[name]
        if self.bars is not None:
            self.bars.remove(name)
            self.bars.overall(state)
        self.last_overall = state
        self.line(
            f"step {state.ended} of {state.steps}: {name}: {what} after {took}"
            + ("" if why == "new" else f" ({why})")
            + ("" if self.bars is not None or state.ended == state.steps else self.time_left())
        )

    def time_left(self) -> str:
        """Return the time left as the end of a line; nothing where it is not known."""
        seconds = None if self.last_overall is None else self.last_overall.seconds_left
        return "" if seconds is None else f", {time_left(seconds)}"


def counted(steps: int) -> str:
    """Return a number of steps in words."""
    return f"{steps} step{'' if steps == 1 else 's'}"
