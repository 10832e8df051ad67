"""The configuration of a merge, checked before any model is opened."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from koine.combine.merging.method_registry import MAX_VALUE
from koine.combine.merging.methods import MergeMethod, find_method
from koine.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The configuration of a merge: models, method, weights and options.

    Attributes:
        method: A name in `koine.combine.merging.methods.METHODS`.
        models: The models' folders.
        base: Their common ancestor, for methods that need it.
        weights: One per model, for methods that take weights.
        weights_for: Pairs of a pattern (`model.layers.[0-3].*`) and the weights of the tensors that it names.
            The first pattern that fits counts.
        options: The method's own numbers and switches.
        seed: Random seed for methods that drop entries.
        tokenizer: `first`, `base` or the folder of a model, whose tokenizer and chat template the result has.
            Empty: the first model's, and the tokenizers must not differ.
        unrelated: Merge models without a common ancestor too.
        dtype: Of the result; None: the first model's.
        max_shard_bytes: Largest file of weights.
    """

    method: str
    models: tuple[Path, ...]
    base: Path | None = None
    weights: tuple[float, ...] = ()
    weights_for: tuple[tuple[str, tuple[float, ...]], ...] = ()
    options: Mapping[str, float | bool] = field(default_factory=dict)
    seed: int = 0
    tokenizer: str = ""
    unrelated: bool = False
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, paths as text."""
        content = asdict(self)
        content["models"] = [str(path) for path in self.models]
        content["base"] = None if self.base is None else str(self.base)
        content["options"] = dict(self.options)
        return content

    def merge_method(self) -> MergeMethod:
        """Return the method; raise `UserError` for one that does not exist."""
        return find_method(self.method)

    def weights_of(self, name: str) -> tuple[float, ...]:
        """Return the models' weights for a tensor."""
        for pattern, weights in self.weights_for:
            if fnmatch.fnmatchcase(name, pattern):
                return weights
        return self.weights


def check_config(config: MergeConfig) -> None:
    """Raise `UserError` where a configuration does not fit its method."""
    method, count = config.merge_method(), len(config.models)
    least, most = method.models
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"at least {least}"
        raise UserError(f"{config.method} merges {wanted} models, and {count} are given")
    if method.takes("base") and config.base is None:
        raise UserError(f"{config.method} needs the common ancestor", hint="give --base MODEL")
    if not method.takes("base") and config.base is not None:
        raise UserError(f"{config.method} uses no base", hint="leave --base out")
    for weights in (config.weights, *(weights for _, weights in config.weights_for)):
        _check_weights(config, method, weights)
    method.check_options(config.options)
    if config.dtype is not None and config.dtype not in DTYPES:
        raise UserError(f"unknown dtype '{config.dtype}'", hint=did_you_mean(config.dtype, DTYPES))


def _check_weights(config: MergeConfig, method: MergeMethod, weights: tuple[float, ...]) -> None:
    count, given = len(config.models), ", ".join(map(str, weights))
    if not method.takes("weights"):
        if weights:
            raise UserError(f"{config.method} uses no weights", hint="leave --weights out")
        return
    if len(weights) != count:
        raise UserError(
            f"{len(weights)} weights for {count} models", hint="give one each, with commas between"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"the weights are {given}", hint="they must be numbers")
    if any(abs(weight) > MAX_VALUE for weight in weights):
        raise UserError(f"the weights are {given}", hint=f"they must not be above {MAX_VALUE:g}")
    default = method.parameters["normalize"].default if "normalize" in method.parameters else False
    if config.options.get("normalize", default) and abs(sum(weights)) < 1e-8:
        raise UserError(
            "the weights sum to 0", hint="they are divided by their sum: choose others, or --no-normalize"
        )
