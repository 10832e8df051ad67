"""Send figures to a tracker from a thread of its own, so that the tracker never holds a training up.

`metrics.jsonl` stays the source of truth; the tracker's run is a copy of it. What happens when it fails:

| when | what happens |
|---|---|
| at the first start, before any step | the training is refused, with one line |
| later, or when a training resumes | one warning; the training goes on without the tracker |
| at the next restart of that training | figures that the tracker lacks are sent from `metrics.jsonl` |
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from koine.errors import KoineWarning, UserError, first_line
from koine.fields import Fields
from koine.files import parse_json, read_json, write_json
from koine.train.tracking.run_logger import Outcome, RunLogger, TrackedRun

RECORD = "tracking.json"
"""File in a training's folder: the tracker, the id of its run, and the next step that it has to get."""
START_SECONDS = 300.0
FINISH_SECONDS = 60.0
RECORD_SECONDS = 30.0
"""Time between two writes of the record: a killed process knows so much too little of what the tracker has."""
MOST_WAITING = 10_000
"""Lines of figures that wait for a tracker; one that is further behind counts as failed."""

_Item = tuple[int, Mapping[str, float]]


class Tracking:
    """A tracker's run that follows a training."""

    def __init__(
        self, logger: RunLogger, folder: Path, *, name: str, config: Mapping[str, Any], first_step: int
    ) -> None:
        """Open the run, or that of the training's last start again, and wait until it is open.

        Args:
            logger: the tracker.
            folder: the training's, with its `metrics.jsonl`.
            name: of the run.
            config: of the training, as JSON values.
            first_step: the step that comes next; the tracker gets earlier ones that it lacks.

        Raises:
            UserError: the tracker does not start, and no step has been taken yet.
        """
        self.logger, self.record = logger, folder / RECORD
        self.waiting: queue.Queue[_Item | Outcome] = queue.Queue(MOST_WAITING)
        self.error: str | None = None
        self.is_warned = False
        self.recorded = 0.0
        self.run_id, self.next_step = self._read_record()
        earlier = _lines(folder / "metrics.jsonl", self.next_step) if first_step else []
        self.is_open = threading.Event()
        run = TrackedRun(name=name, config=config, run_id=self.run_id)
        # A daemon: a tracker that hangs does not keep the process alive.
        self.thread = threading.Thread(target=self._work, args=(run, earlier), daemon=True, name="tracking")
        self.thread.start()
        if not self.is_open.wait(START_SECONDS):
            self.error = f"no answer in {START_SECONDS:.0f} s"
        if self.error is not None and first_step == 0:
            raise UserError(
                f"{logger.name} does not start: {self.error}",
                hint="mend that, use its offline mode, or train without --track",
            )
        self._warn_of_failure()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand the figures of a step over; never waits, never raises."""
        if self.error is None:
            try:
                self.waiting.put_nowait((step, dict(figures)))
            except queue.Full:
                self.error = f"it is {MOST_WAITING:,} lines behind"
        self._warn_of_failure()

    def finish(self, outcome: Outcome) -> None:
        """Send what waits and close the run; give up on a tracker that takes too long."""
        if self.error is None:
            with contextlib.suppress(queue.Full):
                self.waiting.put(outcome, timeout=FINISH_SECONDS)
                self.thread.join(FINISH_SECONDS)
            if self.thread.is_alive():
                self.error = f"no answer in {FINISH_SECONDS:.0f} s"
        self._warn_of_failure()

    def _work(self, run: TrackedRun, earlier: list[_Item]) -> None:
        """Open the run, then log what is handed over until the end. Runs in the thread."""
        try:
            self.run_id = self.logger.start(run)
            if self.run_id != run.run_id:
                self.next_step = 0
            self._write_record()
            self.is_open.set()
            for step, figures in earlier:
                self._log(step, figures)
            while isinstance(item := self.waiting.get(), tuple):
                self._log(*item)
            self.logger.finish(item)
            self._write_record()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises: the training warns and goes on
            self.error = shorten(f"{type(error).__name__}: {first_line(error)}", 200, placeholder=" ...")
            if self.is_open.is_set():
                self._write_record()
            self.is_open.set()

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        self.logger.log(step, figures)
        self.next_step = step + 1
        if time.monotonic() - self.recorded > RECORD_SECONDS:
            self._write_record()

    def _warn_of_failure(self) -> None:
        if self.error is None or self.is_warned:
            return
        self.is_warned = True
        warnings.warn(
            f"{self.logger.name} has failed ({self.error}); it has the figures before step {self.next_step}. "
            "The training goes on and metrics.jsonl has all figures. If it is resumed, it sends what is missing",
            KoineWarning,
            stacklevel=4,
        )

    def _read_record(self) -> tuple[str | None, int]:
        """Return the id of the run of the last start, and the first step that it may lack."""
        if not self.record.exists():
            return None, 0
        fields = Fields(read_json(self.record), self.record, hint_if_broken="remove it: a new run is begun")
        if fields.text("tracker") != self.logger.name:
            return None, 0
        return fields.text("run"), fields.integer("next_step", low=0)

    def _write_record(self) -> None:
        self.recorded = time.monotonic()
        write_json(
            self.record, {"tracker": self.logger.name, "run": self.run_id, "next_step": self.next_step}
        )


def _lines(metrics: Path, first: int) -> list[_Item]:
    """Return the figures of a `metrics.jsonl` from a step on."""
    if not metrics.exists():
        return []
    entries = [parse_json(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [(entry.pop("step"), entry) for entry in entries if entry["step"] >= first]
