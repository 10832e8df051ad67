"""What a training is: settings, mixture, model, first weights, data, objective. Equal identity, equal result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from koine.data.inspect_step import without_paths
from koine.data.mixture import with_current_names
from koine.errors import UserError
from koine.files import sha256_file
from koine.model.language_model import LanguageModel
from koine.train.settings import RESULT, TrainSettings

if TYPE_CHECKING:
    from koine.data.data_order import DataOrder

SAMPLED = 4096  # values of each tensor in the digest of the first weights


def weights_digest(model: LanguageModel) -> str:
    """sha256 over names, shapes, sums and a sample of every tensor: cheap, and different for different weights."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            flat = tensor.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLED)].to(torch.float32).cpu()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def identity(
    model: LanguageModel, objective: Any, data: DataOrder, settings: TrainSettings, tokenizer: Path | None
) -> dict[str, Any]:
    """All that determines the result up to rounding, JSON-able, for a field-by-field comparison."""
    sources = {
        source.name: sha256_file(Path(source.path) / "manifest.json")
        for phase in data.mixture.phases
        for source in phase.all_sources
    }
    value = {
        "objective": getattr(objective, "__qualname__", type(objective).__qualname__),
        "settings": settings.that_change(RESULT),
        "mixture": without_paths(data.mixture.to_json()),
        "sources": sources,
        "model": model.describe(),
        "first_weights": weights_digest(model),
        "tokenizer": None if tokenizer is None else sha256_file(Path(tokenizer) / "tokenizer.json"),
    }
    return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]


def check_difference(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raise `UserError` with every field that differs between a folder's training and the one that is asked for."""
    from koine.train.checkpoint import difference

    before = {**before, "mixture": with_current_names(before.get("mixture"))}
    lines = difference(before, now)
    if lines:
        raise UserError(
            "this folder holds a training with other settings: " + "; ".join(lines),
            where=where,
            hint="run the same command again to resume, or choose another --out",
        )
