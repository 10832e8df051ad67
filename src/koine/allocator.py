"""How the C library handles the memory of large temporaries."""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory of freed tensors for the next ones; returns whether it could be told.

    By default every tensor above some 128 KiB to 32 MiB is mapped anew and handed back when freed, so that each step of a training on
    CPU faults in its activations page by page again: the same step took 0.51 s with this and between 1.3 and 3.6 s without it
    (docs/explanation/log.md). The process keeps the memory of its peak until it ends; the peak itself is the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
