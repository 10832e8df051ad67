"""Helpers of the merging tests: a usual configuration, and the tensors of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import METHODS


def config_of(method: str, models: dict[str, Path], **more: Any) -> MergeConfig:
    """Return a usual configuration of a method, for the models `a`, `b` and `base`."""
    found = METHODS[method]
    fields: dict[str, Any] = {"method": method, "models": (models["a"], models["b"])}
    if found.takes("weights"):
        fields["weights"] = (0.25, 0.75)
    if found.takes("base"):
        fields["base"] = models["base"]
    fields["options"] = required_options(method)
    return MergeConfig(**(fields | more))


def required_options(method: str) -> dict[str, Any]:
    """Return a usual value for each option without a default."""
    parameters = METHODS[method].parameters
    return {name: 0.3 for name, parameter in parameters.items() if parameter.default is parameter.empty}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found
