"""Checkpoints: folders that are whole or absent, readable on any number of ranks, their damage found and named."""

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
    """A whole checkpoint: its folder and what `checkpoint.json` says."""

    path: Path
    step: int
    about: dict[str, Any]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first; half-written ones have other names."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir()), key=lambda p: int(p.name.split("-")[1]))


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    about: dict[str, Any],
    ranks: Ranks,
    describe: Callable[[Path], None],
) -> Path:
    """Write `folder/step-N`: beside it, synced to disk, then renamed; returns its path.

    about: JSON-able. describe: called on the first rank, adds what a model directory holds besides its weights.
    """
    path, partial = folder / name_of(step), folder / f".{name_of(step)}.partial"
    with disk_errors(path), hide_temporary_name(path, partial), _removed_on_failure(partial, ranks):
        if ranks.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        ranks.barrier()
        with warnings.catch_warnings():
            # Alone is what we mean; torch warns that no process group is there.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Files are synced below, all at once.
            writer = FileSystemWriter(partial, sync_files=False)
            save_distributed(dict(tensors), storage_writer=writer, no_dist=not ranks.several)
        ranks.barrier()
        if ranks.is_main:
            rewrite_index(partial)
            describe(partial)
            files = {p.name: sha256_file(p) for p in sorted(partial.iterdir()) if p.is_file()}
            random_state = base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()
            write_json(
                partial / "checkpoint.json",
                {"format": FORMAT, "step": step, **about, "random_state": random_state, "files": files},
            )
            fsync_tree(partial)
            publish_directory(partial, path)
        ranks.barrier()
    return path


@contextmanager
def _removed_on_failure(partial: Path, ranks: Ranks) -> Iterator[None]:
    """A checkpoint that could not be written leaves nothing: the disk may be full of it."""
    try:
        yield
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def clean(folder: Path, *, keep_last: int, best: int | None) -> None:
    """Remove what a killed run left half-written, and checkpoints that are neither recent nor the best."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    paths = list_checkpoints(folder)
    for path in paths[: max(0, len(paths) - keep_last)]:
        if best is None or path.name != name_of(best):
            # Renamed first, so that a kill leaves no half-removed checkpoint under a whole one's name.
            gone = path.with_name(f".{path.name}.old")
            path.rename(gone)
            shutil.rmtree(gone)


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint, its files checked against their sha256.

    A damaged one is a `UserError` that names the file and the checkpoint before it: going on from an older state without being
    asked would hide the damage.
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
    return read(path, hint=hint)


def read(path: Path, *, hint: str) -> Checkpoint:
    """A checkpoint, its files checked against their sha256; a `UserError` that names a damaged file, with this fix."""
    where = path / "checkpoint.json"
    try:
        about = read_json_object(where)
        if about.get("format", FORMAT) == FORMAT:
            _check(Fields(about, path))
    except UserError as error:
        raise UserError("damaged checkpoint", where=where, hint=hint) from error
    if about.get("format") != FORMAT:
        raise UserError(f"checkpoint of format {about.get('format')}, not {FORMAT}", where=path, hint=hint)
    for name, digest in about["files"].items():
        file = path / name
        if not file.is_file() or sha256_file(file) != digest:
            raise UserError("damaged checkpoint (its sha256 differs)", where=file, hint=hint)
    return Checkpoint(path, about["step"], about)


def _check(fields: Fields) -> None:
    """Raise `UserError` for a field of a checkpoint's record that is of a wrong type."""
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
    best = fields.inner("best", None)
    if best is not None:
        best.integer("step", low=0)
    try:
        state = base64.b64decode(fields.text("random_state"), validate=True)
    except ValueError:
        raise fields.wrong("random_state", "base64") from None
    if len(state) != torch.get_rng_state().numel():
        raise fields.wrong("random_state", "a whole random state")


def load(checkpoint: Checkpoint, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    """Fill `tensors` in place, whatever number of ranks wrote them, and restore the random state."""
    load_tensors(checkpoint.path, read_index(checkpoint.path), tensors, several=ranks.several)
    state = base64.b64decode(checkpoint.about["random_state"])
    try:
        torch.set_rng_state(torch.tensor(list(state), dtype=torch.uint8))
    except RuntimeError as error:
        raise UserError(
            f"its random state is none ({first_line(error)})",
            where=checkpoint.path / "checkpoint.json",
            hint="choose an earlier checkpoint, or train again",
        ) from None


def difference(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: before -> now` for every leaf that differs."""
    lines: list[str] = []
    for key in sorted(before.keys() | now.keys(), key=str):
        old, new = before.get(key), now.get(key)
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {old} -> {new}")
    return lines
