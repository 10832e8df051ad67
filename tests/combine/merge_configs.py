"""What the tests of merging share: a configuration with its usual numbers, and the tensors of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from koine.combine.merging.config import MergeConfig
from koine.combine.merging.methods import METHODS


def config_of(method: str, models: dict[str, Path], **more: Any) -> MergeConfig:
    info = METHODS[method]
    fields: dict[str, Any] = {"method": method, "models": (models["a"], models["b"])}
    if info.takes("weights"):
        fields["weights"] = (0.25, 0.75)
    if info.takes("base"):
        fields["base"] = models["base"]
    if "t" in info.parameters:
        fields["options"] = {"t": 0.3}
    return MergeConfig(**(fields | more))


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found
