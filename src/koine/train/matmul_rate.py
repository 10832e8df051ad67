"""What the hardware allows: the rate of a plain matmul of the model's own shapes."""

from __future__ import annotations

import functools
import time

import torch


@functools.cache
def matmul_ceiling(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, device: str, threads: int, seconds: float = 0.15
) -> float:
    """Operations a second of `[tokens, hidden] @ [hidden, width]` on this machine now; the best of several tries.

    `threads` is part of the cache's key only: set it with `torch.set_num_threads` before.
    """
    left = torch.ones(tokens, hidden, dtype=dtype, device=device)
    right = torch.ones(hidden, width, dtype=dtype, device=device)

    def once() -> float:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(2):
        once()
    best, until = once(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, once())
    return 2.0 * tokens * hidden * width / best
