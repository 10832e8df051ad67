"""The end of a training: the model's folder, and `training.json`, which comes last and says that it is whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from koine.files import fsync_tree, write_json
from koine.model.checkpoint import TOKENIZER_FILES, save_state
from koine.model.decoder import Decoder
from koine.model.interop import CausalLM
from koine.model.mixture_files import carry_mixture_files
from koine.train import checkpoint as checkpoints
from koine.train.optimiser import Optimiser
from koine.train.parallel import Ranks

OTHER_TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json")
"""What a tokenizer of `transformers` may have besides ours."""


def finish(
    model: nn.Module,
    optimiser: Optimiser,
    out: Path,
    tokenizer: Path | None,
    began_as: Path | None,
    ranks: Ranks,
    about: dict[str, Any],
) -> None:
    """Leave a model directory in `out` with `about` as its `training.json`, and drop the checkpoints but the best."""
    full: dict[str, Tensor] = {}
    for name, master in optimiser.masters.items():
        gathered = master.full_tensor() if hasattr(master, "full_tensor") else master
        if ranks.first:
            full[name] = gathered.detach().cpu()
    if not ranks.several:
        optimiser.restore_float32()
    if ranks.first:
        partial = out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(model, CausalLM):
            _save_other(model, partial, tokenizer)
        else:
            assert isinstance(model, Decoder)
            # What is fixed is no master: the domain embeddings of a mixture.
            full |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
            save_state(full, model.config, partial, tokenizer=tokenizer)
        fsync_tree(partial)
        for path in sorted(partial.iterdir()):
            path.replace(out / path.name)
        partial.rmdir()
        if began_as is not None:
            carry_mixture_files(began_as, out)
        write_json(out / "training.json", about)
        best = about["best"] and about["best"]["step"]
        checkpoints.clean(out / "checkpoints", keep_last=0, best=best)
        if not any((out / "checkpoints").iterdir()):
            (out / "checkpoints").rmdir()
    ranks.barrier()


def _save_other(model: CausalLM, folder: Path, tokenizer: Path | None) -> None:
    """As `transformers` saves it, with the tokenizer's files."""
    from transformers.utils import logging

    folder.mkdir()
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.inner.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()
    for name in (*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES):
        if tokenizer is not None and (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)
