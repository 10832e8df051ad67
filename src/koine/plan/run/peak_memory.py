"""Measure the peak memory of a process and its children."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

EVERY_SECONDS = 0.2


def own_peak() -> int:
    """Return the peak resident bytes of this process since it was started."""
    if sys.platform == "linux":
        # ru_maxrss of Linux survives exec, and with it the size of whatever process started this one.
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakMemory:
    """Samples the resident bytes of this process and its descendants while entered; `.bytes` is the peak.

    Shared memory counts in each process, so the figure is an upper bound with forked children.

    without: id of a process that does not count.
    """

    def __init__(self, *, without: int | None = None) -> None:
        self.without = without
        self.sampled = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        import psutil

        this = psutil.Process()
        while not self._end.wait(EVERY_SECONDS):
            total = 0
            for process in [this, *this.children(recursive=True)]:
                if process.pid != self.without:
                    try:
                        total += process.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
            self.sampled = max(self.sampled, total)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """Peak resident bytes: of this process exactly, of its children as sampled."""
        return max(self.sampled, own_peak())
