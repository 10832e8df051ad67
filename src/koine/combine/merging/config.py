"""What is merged, and how; and whether that makes sense before any model is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from koine.combine.merging.methods import METHODS, MergeMethod
from koine.errors import UserError, did_you_mean

LARGEST = 1e30
"""Of weights and factors: above it float32 holds none."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """What is merged, and how.

    weights: one a model. weights_for: pairs of a pattern (`model.layers.[0-3].*`) and the weights of the tensors that it names; the first that fits counts.
    tokenizer: `first`, `base`, or the folder of a model: whose tokenizer and chat template the result has; empty: the first's, and the tokenizers must not differ.
    options: the method's own numbers. dtype: of the result; None: the first model's. unrelated: models without a common ancestor are merged too.
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
        """As JSON, paths as text."""
        content = asdict(self)
        content["models"] = [str(path) for path in self.models]
        content["base"] = None if self.base is None else str(self.base)
        content["options"] = dict(self.options)
        return content

    def method_info(self) -> MergeMethod:
        """The method; raises `UserError` for one that does not exist."""
        if self.method not in METHODS:
            raise UserError(f"unknown method '{self.method}'", hint=did_you_mean(self.method, METHODS))
        return METHODS[self.method]


def check_config(config: MergeConfig) -> None:
    """Raise `UserError` where a configuration does not fit its method."""
    info = config.method_info()
    least, most = info.models
    count = len(config.models)
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"at least {least}"
        raise UserError(f"{config.method} merges {wanted} models, and {count} are given")
    if info.takes("base") != (config.base is not None):
        raise UserError(
            f"{config.method} needs the common ancestor"
            if info.takes("base")
            else f"{config.method} uses no base",
            hint="give --base MODEL" if info.takes("base") else "leave --base out",
        )
    for weights in (config.weights, *(weights for _, weights in config.weights_for)):
        if not info.takes("weights"):
            if weights:
                raise UserError(f"{config.method} uses no weights", hint="leave --weights out")
            continue
        if len(weights) != count:
            raise UserError(
                f"{len(weights)} weights for {count} models", hint="give one each, with commas between"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"the weights are {', '.join(map(str, weights))}", hint="they must be numbers")
        if any(abs(weight) > LARGEST for weight in weights):
            raise UserError(
                f"the weights are {', '.join(map(str, weights))}", hint=f"they must not be above {LARGEST:g}"
            )
        divided = config.options.get(
            "normalize", info.parameters.get("normalize") and info.parameters["normalize"].default
        )
        if divided and abs(sum(weights)) < 1e-8:
            raise UserError(
                "the weights sum to 0", hint="they are divided by their sum: choose others, or --no-normalize"
            )
    for name in config.options:
        if name not in info.parameters:
            raise UserError(
                f"{config.method} has no option '{name}'", hint=did_you_mean(name, info.parameters)
            )
    for name, parameter in info.parameters.items():
        if name not in config.options and parameter.default is parameter.empty:
            raise UserError(f"{config.method} needs --{name}", hint=f"for example --{name} 0.5")
    for name, value in config.options.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}", where=f"--{name}", hint="it must be a number")
        if abs(value) > LARGEST:
            raise UserError(f"{name} is {value}", where=f"--{name}", hint=f"it must not be above {LARGEST:g}")
    t = config.options.get("t")
    if t is not None and not 0.0 <= t <= 1.0:
        raise UserError(f"t is {t}", where="--t", hint="it must lie between 0 and 1")
    density = config.options.get("density")
    if density is not None and not 0.0 < density <= 1.0:
        raise UserError(f"the density is {density}", hint="it must be above 0 and at most 1")
    if config.dtype is not None and config.dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(
            f"unknown dtype '{config.dtype}'",
            hint=did_you_mean(config.dtype, ("float32", "bfloat16", "float16")),
        )
