"""Merging of whole checkpoints: tensor by tensor, a piece at a time, on several threads, resumable.

Work is done beside `out`, in `.NAME.merge`, whose journal says what is finished; the same command goes on there after an interruption. Elementwise methods work on
blocks of rows; the others walk through one tensor of each model, in blocks too, and hold the result of it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from koine.combine.alike import model_configuration
from koine.combine.fit import Plan, plan_merge
from koine.combine.journal import read_journal
from koine.combine.memory import (
    WHOLE_ENTRIES,
    ByteBudget,
    budget_of,
    workers_of,
    working_bytes,
)
from koine.combine.methods import BLOCK
from koine.combine.recipe import Recipe
from koine.combine.tensor_files import Checkpoint, CheckpointWriter, Entry, StoredTensor
from koine.combine.vocabularies import write_tokenizer
from koine.errors import UserError
from koine.files import (
    disk_errors,
    exclusive,
    fsync_tree,
    publish_directory,
    refuse_inside,
    write_json,
)
from koine.hardware import usable_cores
from koine.model.mixture_files import carry_mixture_files

SYNC_BYTES = 64 * 2**20
"""So many bytes are written, at least, between two entries of the journal."""

SAMPLED = 32_768
"""Entries of each tensor from which the report's figures are estimated."""

WEIGHT_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.h5",
    "*.msgpack",
)
NOT_COPIED = (
    *WEIGHT_FILES,
    "README.md",
    "artifact.json",
    "training.json",
    "metrics*",
    "tensorboard",
    "checkpoints",
    ".*",
    "merge*.json",
)


def merge(recipe: Recipe, out: Path, *, threads: int | None = None, say: Any = None) -> dict[str, Any]:
    """Merge into the new folder `out`, and return the report (also written there as `merge_report.json`).

    threads: tensors at a time; default: the cores. say: called with tensors done and in all.

    Raises `UserError` where the models do not fit, a tensor holds NaN or infinity, `out` exists, or the disk is full; nothing half-written is then left. An
    interruption leaves the work beside `out`, and the same recipe goes on there.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("exists already", where=out, mend="choose another --out or remove it first")
    refuse_inside(out, [*recipe.models, *([] if recipe.base is None else [recipe.base])])
    plan = plan_merge(recipe)
    workers = threads or usable_cores()
    work = out.with_name(f".{out.name}.merge")
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(out.with_name(f".{out.name}.merge.lock"), doing=f"merging into {out}"):
                try:
                    report = _run(plan, work, workers, say)
                    _finish(plan, work, report)
                    fsync_tree(work)
                    publish_directory(work, out)
                except (UserError, OSError):
                    # What was wrong will be wrong again; an interruption is no error and keeps the work.
                    shutil.rmtree(work, ignore_errors=True)
                    raise
                finally:
                    out.with_name(f".{out.name}.merge.lock").unlink(missing_ok=True)
        return report
    finally:
        plan.close()


def _fingerprint(plan: Plan) -> str:
    """Of the recipe and of the models' files as they are."""
    files = sorted({entry.file for one in plan.everyone() for entry in one.values()})
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([plan.recipe.to_json(), state]).encode()).hexdigest()


def _run(plan: Plan, work: Path, threads: int, say: Any) -> dict[str, Any]:
    journal = work / "journal.jsonl"
    fingerprint = _fingerprint(plan)
    done: dict[str, Any] = {}
    lines = read_journal(journal)
    if lines and lines[0].get("fingerprint") == fingerprint:
        done = {name: figures for line in lines[1:] for name, figures in line.items()}
    elif work.exists():
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    budget = ByteBudget(budget_of(plan, threads))
    writer = CheckpointWriter(
        work, plan.layout, max_shard_bytes=plan.recipe.max_shard_bytes, resume=journal.exists()
    )
    lock, pending, written = threading.Lock(), dict[str, Any](), 0
    entering: Future[None] | None = None
    before = torch.get_num_threads()
    # The largest first: at the end all threads have something to do.
    todo = sorted(
        (name for name in plan.layout if name not in done),
        key=lambda name: -torch.Size(plan.layout[name][1]).numel(),
    )
    try:
        with journal.open("a") as log:
            if not done and not journal.stat().st_size:
                log.write(json.dumps({"fingerprint": fingerprint}) + "\n")
                log.flush()

            def enter(figures: dict[str, Any]) -> None:
                writer.sync()
                log.write(json.dumps(figures) + "\n")
                log.flush()
                os.fsync(log.fileno())

            def one(name: str) -> None:
                nonlocal written, entering
                with budget.hold(working_bytes(plan, name)):
                    figures = _merge_tensor(plan, writer, name)
                with lock:
                    done[name] = pending[name] = figures
                    written += writer.entries[name].nbytes
                    if written >= SYNC_BYTES and (entering is None or entering.done()):
                        if entering is not None:
                            entering.result()
                        # The disk works while the next tensors are merged.
                        entering = syncing.submit(enter, dict(pending))
                        pending.clear()
                        written = 0
                    if say is not None:
                        say(len(done), len(plan.layout))

            # One thread of torch in each worker: they would wait for each other.
            torch.set_num_threads(1)
            with ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(workers_of(plan, threads)) as pool:
                futures = [pool.submit(one, name) for name in todo]
                try:
                    for future in futures:
                        future.result()
                finally:
                    pool.shutdown(wait=True, cancel_futures=True)
                    if entering is not None:
                        entering.result()
                    if pending:
                        enter(pending)
    finally:
        torch.set_num_threads(before)
        writer.close()
    return {"tensors": {name: done[name] for name in plan.layout}}


def _merge_tensor(plan: Plan, writer: CheckpointWriter, name: str) -> dict[str, Any]:
    """Merge the tensors of one name and write the result; its figures for the report."""
    everyone = plan.everyone()
    entries = [one[name] for one in everyone]
    dtype, _ = plan.layout[name]
    if not dtype.is_floating_point:
        first = everyone[0].read(name)
        for one in everyone[1:]:
            if not torch.equal(one.read(name), first):
                raise UserError(
                    f"{name} is of whole numbers and differs from that of {everyone[0].path}",
                    where=one.path,
                    mend="whole numbers are copied where they are equal, and not merged",
                )
        writer.write(name, first)
        return {}
    if plan.by_token(name):
        tensors = [one.read(name) for one in everyone]
        for one, tensor in zip(everyone, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        _write(writer, name, _by_token(plan, name, tensors), dtype)
        return {}
    if not plan.info.elementwise:
        stored = [_stored(one, name) for one in everyone]
        # Several passes over a small tensor are made in memory.
        small = entries[0].numel <= WHOLE_ENTRIES
        given = [one[:] for one in stored] if small else cast("list[Tensor]", stored)
        _write(writer, name, apply_method(plan, name, given, block=0), dtype)
        return figures_of(given, plan) if entries[0].numel else {}
    entry = entries[0]
    rows = max(1, BLOCK // max(1, entry.row))
    # Room for the whole sample before the first block: what is small and kept between large blocks that come and go tears the heap apart.
    sampled = [_room(entry, tensor_dtype=one[name].dtype, rows=rows) for one in everyone]
    filled = 0
    for number, start in enumerate(range(0, entry.rows, rows)):
        stop = min(entry.rows, start + rows)
        tensors = [one.read(name, start, stop) for one in everyone]
        for one, tensor in zip(everyone, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        _write(writer, name, apply_method(plan, name, tensors, block=number), dtype, start)
        parts = [tensor.reshape(-1)[:: _stride(entry.numel)] for tensor in tensors]
        for kept, part in zip(sampled, parts, strict=True):
            kept[filled : filled + part.numel()] = part
        filled += parts[0].numel()
    return figures_of([kept[:filled] for kept in sampled], plan) if filled else {}


def _stored(checkpoint: Checkpoint, name: str) -> StoredTensor:
    return StoredTensor(checkpoint, name, lambda part: _refuse_not_finite(part, name, checkpoint.path))


def apply_method(plan: Plan, name: str, tensors: Sequence[Tensor], *, block: int) -> Tensor:
    """The method on the models' tensors, or on a block of them (the base's last, where there is one)."""
    arguments: dict[str, Any] = dict(plan.recipe.options)
    models = list(tensors)
    if plan.base is not None:
        arguments["base"] = models.pop()
    if plan.info.takes("weights"):
        arguments["weights"] = plan.weights_of(name)
    if plan.info.takes("generator"):
        # Of the tensor and the block, so that the order of the work changes nothing.
        text = f"{plan.recipe.seed} {name} {block}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return plan.info.function(models, **arguments)


def _by_token(plan: Plan, name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Rows that all models have are merged; of the others the models that have one are averaged by their weights."""
    vocabularies = plan.vocabularies
    assert vocabularies is not None
    weights = plan.weights_of(name) if plan.info.takes("weights") else (1.0,) * len(plan.models)
    shared, alone = vocabularies.shared, vocabularies.alone
    out = torch.empty((vocabularies.rows, *tensors[0].shape[1:]), dtype=tensors[0].dtype)
    common = [
        tensor.index_select(0, places) for tensor, places in zip(tensors, vocabularies.places, strict=True)
    ]
    out[shared] = apply_method(plan, name, common, block=0)
    for row, holders in alone:
        given = [
            (weights[model] if model < len(weights) else 0.0, tensors[model][place])
            for model, place in holders
        ]
        if abs(sum(weight for weight, _ in given)) < 1e-8:
            # The weights of these models cancel out, or are 0: they say nothing about a row that the others lack.
            given = [(1.0, tensor) for _, tensor in given]
        total = sum(weight for weight, _ in given)
        out[row] = sum(tensor.float() * (weight / total) for weight, tensor in given).to(out.dtype)  # type: ignore[union-attr]
    return out


def _write(writer: CheckpointWriter, name: str, result: Tensor, dtype: torch.dtype, start: int = 0) -> None:
    """Write a result, or rows of one, as `dtype`; raises `UserError` where it is too large for that."""
    cast = result.to(dtype)
    if not _finite(cast):
        raise UserError(
            f"the merged {name} holds NaN or infinity as {str(dtype).removeprefix('torch.')}",
            mend="the weights or the scale are too large, or --dtype too narrow",
        )
    writer.write(name, cast, start)


def _refuse_not_finite(tensor: Tensor, name: str, path: Path) -> None:
    if not _finite(tensor):
        raise UserError(
            f"{name} holds NaN or infinity", where=path, mend="this checkpoint is broken; use an earlier one"
        )


def _finite(tensor: Tensor) -> bool:
    # The sum is finite where every entry is; only where it is not, the entries are looked at (large ones may overflow it). One of
    # bfloat16 has the range of float32, adds up in it, and takes half the time without a copy in it.
    wide = None if tensor.dtype == torch.bfloat16 else torch.float32
    return math.isfinite(float(tensor.sum(dtype=wide))) or bool(torch.isfinite(tensor).all())


def _stride(numel: int) -> int:
    # Odd, so that no column of a matrix is preferred.
    return max(1, numel // SAMPLED) | 1


def _room(entry: Entry, *, tensor_dtype: torch.dtype, rows: int) -> Tensor:
    """For the samples of all blocks of `rows` rows; each block may hold one entry more than its share."""
    blocks = -(-entry.rows // rows)
    return torch.empty(entry.numel // _stride(entry.numel) + blocks + 1, dtype=tensor_dtype)


def figures_of(tensors: Sequence[Tensor], plan: Plan) -> dict[str, Any]:
    """How far apart the models are in one tensor, from a sample of its entries.

    distance: of each model from the base (from their mean, where there is none), relative to its norm. cosine: the least between two models' differences.
    sign_conflicts: share of the entries in which not all differences have one sign.
    """
    stride = _stride(tensors[0].numel())
    parts = torch.stack([tensor.reshape(-1)[::stride].float() for tensor in tensors])
    origin = parts.mean(dim=0) if plan.base is None else parts[-1]
    deltas = (parts if plan.base is None else parts[:-1]) - origin
    norm, norms = float(origin.norm()), deltas.norm(dim=1)
    figures: dict[str, Any] = {
        "distance": [round(value / norm, 6) if norm else None for value in norms.tolist()]
    }
    if plan.base is not None and len(deltas) > 1:
        unit = deltas / norms.clamp_min(1e-12)[:, None]
        above, below = torch.triu_indices(len(deltas), len(deltas), offset=1)
        conflicts = (deltas.amax(dim=0) > 0) & (deltas.amin(dim=0) < 0)
        figures |= {
            "cosine": round(float((unit @ unit.T)[above, below].min()), 6),
            "sign_conflicts": round(float(conflicts.float().mean()), 6),
        }
    return figures


def _finish(plan: Plan, work: Path, report: dict[str, Any]) -> None:
    """The files beside the weights."""
    from koine.combine.card import model_card

    source = plan.models[0].path
    for file in sorted(source.iterdir()):
        if not any(fnmatch.fnmatch(file.name, pattern) for pattern in NOT_COPIED) and file.is_file():
            shutil.copyfile(file, work / file.name)
    carry_mixture_files(source, work)
    config = model_configuration(source)
    if plan.recipe.dtype is not None:
        config["dtype"] = plan.recipe.dtype
        config.pop("torch_dtype", None)
    if plan.vocabularies is not None or plan.tokenizer != source:
        rows = None if plan.vocabularies is None else plan.vocabularies.rows
        write_tokenizer(plan.tokenizer, work, config, rows=rows)
    if config:
        write_json(work / "config.json", config)
    report |= {
        "recipe": plan.recipe.to_json(),
        "models": [
            {"path": str(one.path), "bytes": sum(entry.nbytes for entry in one.values())}
            for one in plan.everyone()
        ],
        "estimated_from": f"at most {SAMPLED} entries of each tensor",
    }
    write_json(work / "merge_report.json", report)
    (work / "README.md").write_text(model_card(plan.recipe, plan.info.source), encoding="utf-8")
    (work / "journal.jsonl").unlink()
