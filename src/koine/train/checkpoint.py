"""Checkpoints of a training: complete or absent, readable on any number of ranks, checked by sha256."""

from __future__ import annotations

import base64
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from koine.errors import UserError, first_line
from koine.fields import Fields, check_file_name, check_number
from koine.files import (
    disk_errors,
    fsync_tree,
    hide_temporary_name,
    publish_directory,
    read_json_object,
    sha256_file,
    write_json,
)
from koine.train.checkpoint_index import INDEX, load_tensors, read_index, rewrite_index
from koine.train.distributed import Ranks

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, the number of steps done, and the content of `checkpoint.json`."""

    path: Path
    step: int
    record: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Return the folder name of a checkpoint after `step` steps."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders, oldest first; incomplete ones have other names."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: int(p.name.split("-")[1]))


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    record: dict[str, Any],
    ranks: Ranks,
    write_description: Callable[[Path], None],
) -> Path:
    """Write `folder/step-N` and return its path: written beside it, synced to disk, then renamed.

    Args:
        folder: the folder of the checkpoints.
        step: number of steps done.
        tensors: weights and optimiser state of this rank.
        record: JSON values of `checkpoint.json`.
        ranks: all of them call this.
        write_description: called on the main rank with the folder, to write its files besides the tensors.
    """
    path, partial = folder / checkpoint_name(step), folder / f".{checkpoint_name(step)}.partial"
    with disk_errors(path), hide_temporary_name(path, partial), _remove_on_failure(partial, ranks):
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        ranks.barrier()
        with warnings.catch_warnings():
            # torch warns that there is no process group: one process needs none.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Files are synced below, all at once.
            writer = FileSystemWriter(partial, sync_files=False)
            save_distributed(dict(tensors), storage_writer=writer, no_dist=not ranks.is_distributed)
        ranks.barrier()
        if ranks.is_main:
            rewrite_index(partial)
            write_description(partial)
            files = {p.name: sha256_file(p) for p in sorted(partial.iterdir()) if p.is_file()}
            random_state = base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()
            write_json(
                partial / "checkpoint.json",
                {"format": FORMAT, "step": step, **record, "random_state": random_state, "files": files},
            )
            fsync_tree(partial)
            publish_directory(partial, path)
        ranks.barrier()
    return path


@contextmanager
def _remove_on_failure(partial: Path, ranks: Ranks) -> Iterator[None]:
    """Remove a checkpoint that could not be written: the disk may be full of it."""
    try:
        yield
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def clean(folder: Path, *, keep_last: int, best: int | None) -> None:
    """Remove incomplete checkpoints of a killed run, and those that are neither recent nor the best.

    Args:
        folder: the folder of the checkpoints.
        keep_last: how many recent ones are kept.
        best: step of the best one.
    """
    for incomplete in folder.glob(".step-*"):
        shutil.rmtree(incomplete, ignore_errors=True)
    paths = list_checkpoints(folder)
    for path in paths[: max(0, len(paths) - keep_last)]:
        if best is None or path.name != checkpoint_name(best):
            # Renamed first, so that a kill leaves no half-removed checkpoint under the name of a complete
            # one.
            removed = path.with_name(f".{path.name}.old")
            path.rename(removed)
            shutil.rmtree(removed)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint, its files checked against their sha256; None if there is none.

    Raises `UserError` for a damaged one, with the file and the checkpoint before it. The older one is not
    used by itself: that would hide the damage.
    """
    paths = list_checkpoints(folder)
    if not paths:
        return None
    path = paths[-1]
    hint = f"remove {path.name} to " + (
        f"go on from {paths[-2].name}"
        if len(paths) > 1
        else "start from the beginning (there is none before it)"
    )
    return read_checkpoint(path, hint=hint)


def read_checkpoint(path: Path, *, hint: str) -> Checkpoint:
    """Return a checkpoint, its files checked against their sha256.

    Raises `UserError` with the damaged file and `hint`.
    """
    where = path / "checkpoint.json"
    try:
        record = read_json_object(where)
        if record.get("format", FORMAT) == FORMAT:
            _check_record(Fields(record, path))
    except UserError as error:
        raise UserError("damaged checkpoint", where=where, hint=hint) from error
    if record.get("format") != FORMAT:
        raise UserError(f"checkpoint of format {record.get('format')}, not {FORMAT}", where=path, hint=hint)
    for name, digest in record["files"].items():
        file = path / name
        if not file.is_file() or sha256_file(file) != digest:
            raise UserError("damaged checkpoint (its sha256 differs)", where=file, hint=hint)
    return Checkpoint(path, record["step"], record)


def _check_record(fields: Fields) -> None:
    """Raise `UserError` for a field of `checkpoint.json` that is missing or of another type."""
    fields.integer("step", low=0)
    files = fields.inner("files")
    for name in files.value:
        check_file_name("the name of a file", name)
        files.text(name)
    files.text(INDEX)
    fields.inner("identity")
    fields.inner("rounding")
    for losses in (fields.entries("losses"), fields.entries("long_losses", [])):
        for loss in losses:
            check_number("a loss", loss)
    for index, evaluation in enumerate(fields.entries("evaluations", [])):
        if not isinstance(evaluation, dict) or not all(map(_is_figure, evaluation.values())):
            raise fields.wrong("evaluations", f"figures by name (evaluation {index + 1} is not)")
    best = fields.inner("best", None)
    if best is not None:
        best.integer("step", low=0)
    try:
        state = base64.b64decode(fields.text("random_state"), validate=True)
    except ValueError:
        raise fields.wrong("random_state", "base64") from None
    if len(state) != torch.get_rng_state().numel():
        raise fields.wrong("random_state", "a complete random state")


def _is_figure(value: Any) -> bool:
    """Whether a value is a number; a figure that is not finite is one too."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Load `tensors` in place and restore the random state; any number of ranks may have written them."""
    load_tensors(checkpoint.path, read_index(checkpoint.path), tensors, is_distributed=ranks.is_distributed)
    state = base64.b64decode(checkpoint.record["random_state"])
    try:
        torch.set_rng_state(torch.tensor(list(state), dtype=torch.uint8))
    except RuntimeError as error:
        raise UserError(
            f"its random state is none ({first_line(error)})",
            where=checkpoint.path / "checkpoint.json",
            hint="choose an earlier checkpoint, or train again",
        ) from None
