"""Set up torch for a training: threads, random seed, deterministic kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from koine.allocator import keep_freed_memory
from koine.train.settings import TrainSettings


@contextmanager
def deterministic(settings: TrainSettings) -> Iterator[None]:
    """Set threads, seed and deterministic kernels; restore all but the seed afterwards."""
    keep_freed_memory()
    threads, enabled = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if settings.threads and settings.threads != threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    compiles = settings.compile == "on" or torch.cuda.is_available()
    _choose_kernels(True, warn_only=True, compiles=compiles)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _choose_kernels(enabled, warn_only=warn_only, compiles=compiles)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _choose_kernels(deterministic: bool, *, warn_only: bool, compiles: bool) -> None:
    """Switch deterministic kernels on or off.

    `use_deterministic_algorithms` also sets an option of torch's compiler, for which it imports it (1.5 s). It is
    left out where nothing can be compiled.
    """
    if compiles:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    else:
        mode = "default" if not deterministic else "warn" if warn_only else "error"
        torch.set_deterministic_debug_mode(mode)
