"""Memory allocation of the C library."""

from __future__ import annotations

import ctypes
import functools
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc keep the memory of freed tensors for the next ones; return whether it does.

    By default glibc maps every tensor above some 128 KiB to 32 MiB anew and returns it when freed. Each
    training step on CPU then page-faults its activations in again: the same step took 0.51 s with this and
    between 1.3 and 3.6 s without it (docs/explanation/log.md). The process keeps its peak memory until it
    ends; the peak is the same.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
