"""A model directory from a checkpoint of a training: the best one, or the last good one before a spike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from koine.errors import UserError
from koine.files import atomic_directory
from koine.model.causal_lm import CausalLM, opens_as_decoder, require_transformers
from koine.model.formats.carried_files import carry_files
from koine.model.formats.config_json import read_config
from koine.model.formats.directory import save_state
from koine.model.formats.eos_ids import eos_ids
from koine.model.language_model import LanguageModel
from koine.train import checkpoint as checkpoints
from koine.train.checkpoint_index import load_tensors, read_index
from koine.train.finish import BESIDE

if TYPE_CHECKING:
    from koine.train.checkpoint import Checkpoint

WEIGHTS, BUFFERS = "weights.", "buffers."


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """What a model of ours holds besides its weights, for a checkpoint: the domain embeddings of a mixture are fixed."""
    return {BUFFERS + name: tensor for name, tensor in model.fixed_tensors().items()}


def export_checkpoint(
    path: Path, out: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> None:
    """Write the model directory `out` from the checkpoint folder `path` (`OUT/checkpoints/step-N`); the
    checkpoint stays as it is.

    dtype: of the tensors; None: float32, as they are trained. Raises `UserError` where `path` is no whole
    checkpoint, or `out` holds something (unless `overwrite`).
    """
    path = Path(path)
    if not (path / "checkpoint.json").exists():
        raise UserError(
            "is no checkpoint of a training", where=path, hint="give OUT/checkpoints/step-N of a training"
        )
    found = checkpoints.read(path, hint="choose an earlier checkpoint")
    if not (path / "config.json").exists():
        raise UserError(
            "holds no config.json (written by an earlier version of Koine)",
            where=path,
            hint="resume the training, whose next checkpoint will",
        )
    state = _tensors(found)
    with atomic_directory(out, overwrite=overwrite, reads=[path]) as folder:
        if opens_as_decoder(path):
            save_state(state, read_config(path), folder, tokenizer=path, dtype=dtype, eos_ids=eos_ids(path))
        else:
            _other_model(path, state, dtype).save(folder, tokenizer=path)
        if (path / BESIDE).is_dir():
            carry_files(path / BESIDE, folder, keep=True)


def _tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights by the names of the model's parameters, without the optimiser's moments, whatever number of ranks wrote them."""
    index = read_index(checkpoint.path)
    wanted: dict[str, Tensor] = {
        name: torch.zeros(about.size, dtype=about.properties.dtype)
        for name, about in index.state_dict_metadata.items()
        if name.startswith((WEIGHTS, BUFFERS)) and isinstance(about, TensorStorageMetadata)
    }
    load_tensors(checkpoint.path, index, wanted, several=False)
    return {name.partition(".")[2]: tensor for name, tensor in wanted.items()}


def _other_model(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None) -> CausalLM:
    """A model of `transformers` from its configuration and these weights."""
    transformers = require_transformers()
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = CausalLM(
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    )
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() ^ state.keys()):
        raise UserError(
            f"its weights are not those of its config.json ({', '.join(missing[:3])})",
            where=path,
            hint="open it with the version of transformers that trained it",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])
    return model if dtype is None else model.to(dtype)
