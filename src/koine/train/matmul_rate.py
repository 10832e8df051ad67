"""Rate of a plain matmul of the model's own shapes, which a training step is compared with."""

from __future__ import annotations

import functools
import time

import torch

MAX_CPU_OPERATIONS = 4e10
"""Operations of one timed matmul on CPU: a second of a slow core. An 8B model's batch would take 15 s."""


@functools.cache
def measure_matmul_rate(
    tokens: int, hidden: int, width: int, dtype: torch.dtype, device: str, threads: int, seconds: float = 0.15
) -> float:
    """Return FLOP/s of `[tokens, hidden] @ [hidden, width]` on this machine now, the best of several tries.

    `threads` only distinguishes cached rates: set it with `torch.set_num_threads` before. On CPU, large
    matmuls are timed with fewer rows, as many as take `MAX_CPU_OPERATIONS`.
    """
    if not device.startswith("cuda"):
        tokens = min(tokens, max(64, int(MAX_CPU_OPERATIONS / (2 * hidden * width))))
    left = torch.ones(tokens, hidden, dtype=dtype, device=device)
    right = torch.ones(hidden, width, dtype=dtype, device=device)

    def time_matmul() -> float:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    for _ in range(2):
        time_matmul()
    best, until = time_matmul(), time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, time_matmul())
    return 2.0 * tokens * hidden * width / best
