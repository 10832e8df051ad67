"""Model directories: the one at the end of a training, and those made of its checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from koine.errors import UserError
from koine.files import atomic_directory, fsync_tree, write_json
from koine.model.causal_lm import CausalLM, opens_as_decoder, require_transformers
from koine.model.formats.carried_files import carry_files, copy_tokenizer
from koine.model.formats.config_json import read_config
from koine.model.formats.directory import save_state
from koine.model.formats.eos_ids import eos_ids
from koine.model.formats.model_card import CARD, ModelCard, Parent, write_model_card
from koine.model.formats.reward_files import is_reward_model
from koine.model.language_model import LanguageModel
from koine.model.lora.files import copy_adapter, is_adapter
from koine.model.reward_model import write_reward_weights
from koine.train import checkpoint as checkpoints
from koine.train.checkpoint_index import load_tensors, read_index
from koine.train.distributed import Ranks
from koine.train.optimiser import Optimiser

if TYPE_CHECKING:
    from koine.train.checkpoint import Checkpoint

WEIGHTS, BUFFERS = "weights.", "buffers."
"""Prefixes of a model's tensors in a checkpoint."""

MODEL_FILES = (
    "config.json", "adapter_config.json", "params.json", "*.safetensors", "*.safetensors.index.json",
    "pytorch_model*", "*.gguf", "*.pth", "*.ckpt",
)  # fmt: skip
"""Files that show that a folder holds a model."""

CARRIED = "beside"
"""Folder of a checkpoint with the files beside the weights of the model that training started from."""


@dataclass(frozen=True)
class OutputFolder:
    """The folder that a training writes, and where the files beside its weights come from."""

    path: Path
    tokenizer: Path | None = None
    """Folder whose tokenizer files are copied."""
    init_from: Path | None = None
    """Folder that the model was opened from; its files beside the weights are copied."""

    @property
    def record(self) -> Path:
        """`training.json`, written last: the training is complete where it exists."""
        return self.path / "training.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    def check_no_other_model(self) -> None:
        """Raise `UserError` where training would replace a model: the one it starts from, or another one.

        An earlier attempt at the same training is no other model: it has checkpoints, or is complete.
        """
        if self.record.exists():
            return
        if self.init_from is not None and self.path.exists() and self.path.samefile(self.init_from):
            raise UserError(
                "is the model that the training starts from", where=self.path, hint="choose another --out"
            )
        if checkpoints.list_checkpoints(self.checkpoints):
            return
        found = next((file for pattern in MODEL_FILES for file in sorted(self.path.glob(pattern))), None)
        if found is not None:
            raise UserError(
                f"holds a model already ({found.name})", where=self.path, hint="choose another --out"
            )

    def remove_checkpoints(self, best_step: int | None) -> None:
        """Remove the checkpoints of a complete training, except the best one."""
        if not self.checkpoints.is_dir():
            return
        checkpoints.clean(self.checkpoints, keep_last=0, best=best_step)
        if not any(self.checkpoints.iterdir()):
            self.checkpoints.rmdir()


def write_model(
    model: LanguageModel,
    optimiser: Optimiser,
    output: OutputFolder,
    ranks: Ranks,
    record: dict[str, Any],
    make_card: Callable[[], ModelCard],
) -> None:
    """Write the trained model, or its adapter, in float32, then `record` as `training.json`; keep only the best checkpoint.

    make_card: called on the main rank.
    """
    weights = gathered_weights(optimiser, ranks)
    adapter = getattr(model, "adapter", None)
    if not ranks.is_distributed:
        optimiser.restore_float32()
    if ranks.is_main:
        partial = output.path / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if adapter is None:
                model.save(partial, tokenizer=output.tokenizer, weights=weights)
            else:
                adapter.save(partial, weights, tokenizer=output.tokenizer)
            write_model_card(partial, make_card())
            fsync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for path in sorted(partial.iterdir()):
            path.replace(output.path / path.name)
        partial.rmdir()
        if output.init_from is not None and adapter is None:
            carry_files(output.init_from, output.path, keep=True)
        write_json(output.record, record)
        best = record["best"]
        output.remove_checkpoints(best["step"] if best else None)
    ranks.barrier()


def gathered_weights(optimiser: Optimiser, ranks: Ranks) -> dict[str, Tensor]:
    """Return the trained weights in float32 on the main rank, nothing elsewhere; all ranks call this."""
    weights: dict[str, Tensor] = {}
    for name, master in optimiser.masters.items():
        gathered = master.full_tensor() if hasattr(master, "full_tensor") else master
        if ranks.is_main:
            weights[name] = gathered.detach().cpu()
    return weights


def write_description(
    model: LanguageModel,
    folder: Path,
    output: OutputFolder,
    card: ModelCard,
    weights: Mapping[str, Tensor],
) -> None:
    """Write the files of a model directory besides its weights, for `export_checkpoint`.

    weights: of an adapter, which is small and so is written whole: a checkpoint is a PEFT adapter too.
    """
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        adapter.save(folder, weights, tokenizer=output.tokenizer)
        write_model_card(folder, card)
        return
    if output.init_from is not None:
        (folder / CARRIED).mkdir()
        carry_files(output.init_from, folder / CARRIED, warn=False)
    model.save_config(folder, tokenizer=output.tokenizer)
    write_model_card(folder, card)


def model_buffers(model: LanguageModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that are not trained: the domain embeddings of a mixture.

    None for an adapter, whose checkpoints hold nothing of the base.
    """
    if getattr(model, "adapter", None) is not None:
        return {}
    return {BUFFERS + name: tensor for name, tensor in model.fixed_tensors().items()}


def export_checkpoint(
    path: Path, out: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Write a model directory, or a PEFT adapter, from a checkpoint; the checkpoint stays as it is.

    Args:
        path: `OUT/checkpoints/step-N` of a training.
        out: the model directory.
        dtype: of the tensors; None: float32, as they are trained.
        overwrite: replace what `out` holds.

    Raises:
        UserError: `path` is no complete checkpoint, or `out` holds something and `overwrite` is false.
    """
    path = Path(path)
    if not (path / "checkpoint.json").exists():
        raise UserError(
            "is no checkpoint of a training", where=path, hint="give OUT/checkpoints/step-N of a training"
        )
    checkpoint = checkpoints.read_checkpoint(path, hint="choose an earlier checkpoint")
    if is_adapter(path):
        _export_adapter(path, out, dtype, overwrite=overwrite)
        return
    if not (path / "config.json").exists():
        raise UserError(
            "holds no config.json (written by an earlier version of Koine)",
            where=path,
            hint="resume the training, whose next checkpoint will",
        )
    weights = _read_weights(checkpoint)
    reward_model = is_reward_model(path)
    if reward_model and any(".lora_" in name for name in weights):
        raise UserError(
            "holds the adapter of a reward model, without its base",
            where=path,
            hint="run the training to its end, which merges the two",
        )
    with atomic_directory(out, overwrite=overwrite, reads=[path]) as folder:
        # A class that our decoder computes too may have been trained through `transformers`.
        if reward_model:
            write_reward_weights(weights, path, folder, dtype=dtype)
        elif opens_as_decoder(path) and not any(name.startswith("inner.") for name in weights):
            save_state(weights, read_config(path), folder, tokenizer=path, dtype=dtype, eos_ids=eos_ids(path))
        else:
            _build_transformers_model(path, weights, dtype).save(folder, tokenizer=path)
        if (path / CARRIED).is_dir():
            carry_files(path / CARRIED, folder, keep=True)
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, folder / CARD)
        else:
            write_model_card(folder, _card_of_old_checkpoint(checkpoint))


def _export_adapter(path: Path, out: Path, dtype: torch.dtype | None, *, overwrite: bool) -> None:
    """Copy the adapter, tokenizer and card out of a checkpoint."""
    with atomic_directory(out, overwrite=overwrite, reads=[path]) as folder:
        copy_adapter(path, folder, dtype=dtype)
        copy_tokenizer(path, folder)
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, folder / CARD)


def _card_of_old_checkpoint(checkpoint: Checkpoint) -> ModelCard:
    """Return the card of a checkpoint that was written before checkpoints had one."""
    identity = checkpoint.record["identity"]
    return ModelCard(
        title=f"Checkpoint after {checkpoint.step:,} steps",
        summary=f"The weights of a training after {checkpoint.step:,} steps.",
        parents=(Parent(path=checkpoint.path, role="checkpoint"),),
        relation="finetune",
        parameters={key: identity.get(key) for key in ("objective", "settings", "mixture")},
    )


def _read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return weights and buffers by the model's names, whatever number of ranks wrote them."""
    index = read_index(checkpoint.path)
    wanted: dict[str, Tensor] = {
        name: torch.zeros(about.size, dtype=about.properties.dtype)
        for name, about in index.state_dict_metadata.items()
        if name.startswith((WEIGHTS, BUFFERS)) and isinstance(about, TensorStorageMetadata)
    }
    load_tensors(checkpoint.path, index, wanted, is_distributed=False)
    return {name.partition(".")[2]: tensor for name, tensor in wanted.items()}


def _build_transformers_model(path: Path, weights: dict[str, Tensor], dtype: torch.dtype | None) -> CausalLM:
    """Return a model of `transformers` with the configuration in `path` and these weights."""
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = CausalLM(
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    )
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() ^ weights.keys()):
        raise UserError(
            f"its weights are not those of its config.json ({', '.join(missing[:3])})",
            where=path,
            hint="open it with the version of transformers that trained it",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return model if dtype is None else model.to(dtype)
