"""The end of a training: the model's folder, and `training.json`, which comes last and says that it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from koine.errors import UserError
from koine.files import fsync_tree, write_json
from koine.model.formats.carried_files import carry_files
from koine.model.language_model import LanguageModel
from koine.train import checkpoint as checkpoints
from koine.train.distributed import Ranks
from koine.train.optimiser import Optimiser

MODEL_FILES = (
    "config.json", "adapter_config.json", "params.json", "*.safetensors", "*.safetensors.index.json",
    "pytorch_model*", "*.gguf", "*.pth", "*.ckpt",
)  # fmt: skip
"""Files that show that a folder holds a model."""

BESIDE = "beside"
"""The folder of a checkpoint with what lay beside the weights of the model that the training began with."""


def check_model(out: Path, init_from: Path | None) -> None:
    """Raise `UserError` where a training would replace a model: the one that it starts from, or any that
    `out` holds.

    What an earlier attempt at the same training left there is none: it has checkpoints, or is complete.
    """
    if (out / "training.json").exists():
        return
    if init_from is not None and out.exists() and out.samefile(init_from):
        raise UserError("is the model that the training starts from", where=out, hint="choose another --out")
    if checkpoints.list_checkpoints(out / "checkpoints"):
        return
    held = next((file for pattern in MODEL_FILES for file in sorted(out.glob(pattern))), None)
    if held is not None:
        raise UserError(f"holds a model already ({held.name})", where=out, hint="choose another --out")


def finish(
    model: LanguageModel,
    optimiser: Optimiser,
    out: Path,
    tokenizer: Path | None,
    init_from: Path | None,
    ranks: Ranks,
    about: dict[str, Any],
) -> None:
    """Leave a model directory in `out` with `about` as its `training.json`, and drop the checkpoints but the best."""
    full: dict[str, Tensor] = {}
    for name, master in optimiser.masters.items():
        gathered = master.full_tensor() if hasattr(master, "full_tensor") else master
        if ranks.is_main:
            full[name] = gathered.detach().cpu()
    if not ranks.several:
        optimiser.restore_float32()
    if ranks.is_main:
        partial = out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            model.save(partial, tokenizer=tokenizer, weights=full)
            fsync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for path in sorted(partial.iterdir()):
            path.replace(out / path.name)
        partial.rmdir()
        if init_from is not None:
            carry_files(init_from, out, keep=True)
        write_json(out / "training.json", about)
        drop_checkpoints(out, about["best"])
    ranks.barrier()


def drop_checkpoints(out: Path, best: dict[str, Any] | None) -> None:
    """Remove the checkpoints of a complete training but the best."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return
    checkpoints.clean(folder, keep_last=0, best=best["step"] if best else None)
    if not any(folder.iterdir()):
        folder.rmdir()


def describe(
    model: LanguageModel, folder: Path, tokenizer: Path | None, init_from: Path | None = None
) -> None:
    """Write what a model is besides its weights, so that a checkpoint can become a model without its training."""
    if init_from is not None:
        (folder / BESIDE).mkdir()
        carry_files(init_from, folder / BESIDE, warn=False)
    model.save_config(folder, tokenizer=tokenizer)
