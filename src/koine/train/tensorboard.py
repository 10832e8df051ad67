"""TensorBoard events, written in the thread of the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 120.0


class TensorBoardWriter:
    """Writes scalars for TensorBoard, as tensorboardX's `SummaryWriter` does, but without its thread.

    A failed write is an `OSError` of the training. In a thread it would be a traceback, and the training
    would go on without its events.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Open the file; events of a killed run from `first_step` on are hidden."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        self._events = EventsWriter(str(folder / "events"))
        self._flushed = time.monotonic()
        self._write(Event(step=first_step, file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Write one scalar of a step."""
        from tensorboardX.summary import scalar

        self._write(self._event(step=step, summary=scalar(name, value)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._events.flush()

    def close(self) -> None:
        """Write the remaining events, synced to the disk."""
        self._events.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
