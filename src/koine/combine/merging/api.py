"""Merge models from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import find_method
from koine.combine.merging.runner import OnProgress, run_merge


def merge(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "linear",
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    weights_for: Mapping[str, Sequence[float]] | None = None,
    tokenizer: str | Path = "",
    dtype: str | None = None,
    unrelated: bool = False,
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    overwrite: bool = False,
    **options: float | bool,
) -> dict[str, Any]:
    """Merge checkpoints of one architecture into the new folder `out`, and return the report.

    Example:
        >>> from koine.combine import merge
        >>> report = merge(["de", "hi"], out="soup", weights=[0.5, 0.5])
        >>> report = merge(["de", "hi"], out="trimmed", method="ties", base="seed", density=0.3)

    Args:
        models: The models' folders.
        out: The folder to write.
        method: `linear`, `slerp`, `task-arithmetic`, `ties`, `dare-linear`, `dare-ties` or `model-stock`; see
            `koine.combine.merging.methods`.
        base: The models' common ancestor, for methods that need it.
        weights: One per model, for methods that take weights; default: equal, with a sum of 1.
        weights_for: Other weights for the tensors that a pattern names, such as
            `{"model.layers.[0-3].*": [0.2, 0.8]}`. The first pattern that fits counts.
        tokenizer: `first`, `base` or a model's folder, whose tokenizer and chat template the result has. By
            default the first model's, and the tokenizers must not differ.
        dtype: `float32`, `bfloat16` or `float16`; default: the first model's.
        unrelated: Merge models without a common ancestor too.
        seed: Random seed for methods that drop entries.
        max_shard_bytes: Largest file of weights.
        threads: Tensors merged at a time; default: the cores.
        on_progress: Called with the number of tensors that are done, and of all.
        overwrite: Replace what stands at `out`.
        options: The method's own numbers and switches, such as `density` or `t`.

    Returns:
        What `merge_report.json` holds: under `tensors`, how far apart the models are in each tensor
        (`koine.combine.merging.tensor.difference_figures`); and the configuration of the merge.

    Raises:
        UserError: See `koine.combine.merging.runner.run_merge`.
    """
    paths = tuple(Path(path) for path in models)
    if weights is None and find_method(method).takes("weights"):
        weights = (1.0 / max(1, len(paths)),) * len(paths)
    config = MergeConfig(
        method=method,
        models=paths,
        base=None if base is None else Path(base),
        weights=tuple(weights or ()),
        weights_for=tuple((pattern, tuple(some)) for pattern, some in (weights_for or {}).items()),
        options=options,
        seed=seed,
        tokenizer=str(tokenizer),
        unrelated=unrelated,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    return run_merge(config, Path(out), threads=threads, on_progress=on_progress, overwrite=overwrite)
