"""Record mergekit's results for tiny models: `python -m tests.combine.merging.record_mergekit [CASE...]`.

It needs `benchmarks/peers/install.py mergekit`.

It writes `recorded/models.safetensors` (a base and three branches of it, `N/name`) and one file per method.
The versions are in `recorded/README.md`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from koine.model import Decoder, save_model
from tests.combine.models import small_config

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "recorded"
MERGEKIT = HERE.parents[2] / ".venv-peers" / "mergekit" / "bin" / "mergekit-yaml"
NAMES = ("base", "a", "b", "c")
CASES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "weights": (0.5, 0.3, 0.4)},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
    "task-arithmetic": {
        "merge_method": "task_arithmetic",
        "weights": (0.5, 0.3, 0.4),
        "parameters": {"lambda": 0.9},
    },
    "ties": {
        "merge_method": "ties",
        "weights": (0.5, 0.3, 0.4),
        "parameters": {"density": 0.3, "normalize": True},
    },
    "ties-sum": {
        "merge_method": "ties",
        "weights": (0.5, 0.3, 0.4),
        "parameters": {"density": 0.6, "normalize": False, "lambda": 0.7},
    },
    # At a density of 1 nothing is dropped: what chance would decide has a closed form.
    "dare-linear": {
        "merge_method": "dare_linear",
        "weights": (0.5, 0.3, 0.4),
        "parameters": {"density": 1.0, "normalize": False, "lambda": 0.9},
    },
    "dare-ties": {
        "merge_method": "dare_ties",
        "weights": (0.5, 0.3, 0.4),
        "parameters": {"density": 1.0, "normalize": True},
    },
    "model-stock": {"merge_method": "model_stock"},
}


def write_models(folder: Path) -> None:
    """A base whose tensors are of the usual size, and branches that share half of their change."""
    torch.manual_seed(0)
    config = small_config(vocab_size=64, hidden_size=16, intermediate_size=24, head_dim=8)
    base = Decoder(config)
    shared = {name: 0.02 * torch.randn_like(tensor) for name, tensor in base.state_dict().items()}
    save_model(base, folder / "base")
    for name in NAMES[1:]:
        branch = Decoder(config)
        branch.load_state_dict(
            {
                key: tensor + shared[key] + 0.02 * torch.randn_like(tensor)
                for key, tensor in base.state_dict().items()
            }
        )
        save_model(branch, folder / name)


def configuration(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """mergekit's own; YAML reads JSON."""
    weights = case.get("weights")
    method = case["merge_method"]
    names = NAMES[1:3] if method == "slerp" else NAMES[1:]
    models = [{"model": str(folder / name)} for name in names]
    for one, weight in zip(models, weights or (), strict=False):
        one["parameters"] = {"weight": weight}  # type: ignore[assignment]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32"}
    if method == "slerp":
        content["base_model"] = str(folder / names[0])
    elif method != "linear":
        content["base_model"] = str(folder / "base")
    if "parameters" in case:
        content["parameters"] = case["parameters"]
    return content


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder)
        everything = {
            f"{name}/{key}": tensor
            for name in NAMES
            for key, tensor in load_file(folder / name / "model.safetensors").items()
        }
        RECORDED.mkdir(exist_ok=True)
        save_file(everything, RECORDED / "models.safetensors")
        for name in sys.argv[1:] or CASES:
            case = CASES[name]
            (folder / "config.yml").write_text(json.dumps(configuration(case, folder)))
            subprocess.run(
                [MERGEKIT, folder / "config.yml", folder / name],
                check=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )
            save_file(load_file(folder / name / "model.safetensors"), RECORDED / f"{name}.safetensors")
    (RECORDED / "README.md").write_text(
        "Made by `python -m tests.combine.merging.record_mergekit` with mergekit 0.1.5; "
        "`models.safetensors` are the inputs.\n"
    )


if __name__ == "__main__":
    main()
