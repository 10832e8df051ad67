"""How torch is set up for a training: threads, determinism, compilation, and the rate that the hardware allows."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from koine.allocator import keep_freed_memory
from koine.errors import KoineWarning
from koine.model.language_model import LanguageModel
from koine.train.matmul_rate import matmul_ceiling
from koine.train.settings import TrainSettings


@contextmanager
def numerics(settings: TrainSettings) -> Iterator[None]:
    """Threads, the seed, and deterministic kernels where there are some; put back afterwards."""
    keep_freed_memory()
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if settings.threads and settings.threads != threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def compile_blocks(model: LanguageModel, settings: TrainSettings) -> None:
    """torch.compile on each block where it is wanted; without a C++ compiler a notice, and the training goes on without."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or settings.compile != "on":
        return
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        warnings.warn(
            "compile: no C++ compiler was found (g++ or clang++); going on without torch.compile",
            KoineWarning,
            stacklevel=3,
        )
        return
    for block in blocks:
        block.compile()


def training_flops(model: LanguageModel, sequence_length: int) -> float | None:
    """Operations a token of one step; None for an architecture that is not ours."""
    from koine.model.config import ModelConfig
    from koine.model.counting import training_flops_per_token

    config = getattr(model, "config", None)
    return training_flops_per_token(config, sequence_length) if isinstance(config, ModelConfig) else None


def measured_ceiling(
    model: LanguageModel, tokens: int, dtype: torch.dtype, device: torch.device
) -> float | None:
    """Operations a second of a matmul of the blocks' input projection; None for an architecture that is not ours."""
    from koine.model.config import ModelConfig

    config = getattr(model, "config", None)
    if not isinstance(config, ModelConfig):
        return None
    width = sum(config.projection_sizes)
    return matmul_ceiling(
        min(tokens, 8192), config.hidden_size, width, dtype, str(device), torch.get_num_threads()
    )
