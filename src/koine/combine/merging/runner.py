"""Merging of whole checkpoints: tensor by tensor, a piece at a time, on several threads, resumable.

Work is done beside `out`, in `.NAME.merge`, whose journal says what is finished; the same command goes on there after an interruption. One tensor is
`koine.combine.merging.tensor`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from koine.combine.compatibility import model_configuration
from koine.combine.merging.budget import (
    ByteBudget,
    memory_budget,
    worker_count,
    working_bytes,
)
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.journal import read_journal
from koine.combine.merging.plan import MergePlan, plan_merge
from koine.combine.merging.tensor import SAMPLED, merge_tensor
from koine.combine.merging.vocabularies import write_tokenizer
from koine.combine.safetensors_stream import CheckpointWriter
from koine.data.drawn import carry_drawn
from koine.errors import UserError
from koine.files import check_inside, claim, clear_partials, remove, write_atomically, write_json
from koine.hardware import usable_cores
from koine.model.formats.carried_files import carry_files
from koine.model.formats.checksum import seal_folder
from koine.model.formats.weight_files import weight_files

JOURNAL = 2
"""Version of the journal's entries."""

SYNC_BYTES = 64 * 2**20
"""So many bytes are written, at least, between two entries of the journal."""

MODULES = ".modules"
"""The folder inside the work's in which weights of sub-folders are merged."""


def merge(
    config: MergeConfig,
    out: Path,
    *,
    threads: int | None = None,
    on_progress: Any = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge into the new folder `out`, and return the report (also written there as `merge_report.json`).

    threads: tensors at a time; default: the cores. say: called with tensors done and in all.

    Raises `UserError` where the models do not fit, a tensor holds NaN or infinity, `out` holds something
    (unless `overwrite`), a model changes meanwhile, or the disk is full; nothing half-written is then left.
    An interruption leaves the work beside `out`, and the same configuration goes on there.
    """
    out = Path(out)
    reads = [*config.models, *([] if config.base is None else [config.base])]
    check_inside(out, reads)
    plan = plan_merge(config)
    workers = threads or usable_cores()
    try:
        with claim(out, overwrite=overwrite, reads=reads) as claimed:
            work = claimed.beside("merge")
            try:
                before = _fingerprint(plan)
                report = _run(plan, work, workers, on_progress)
                _finish(plan, work, report)
                if _fingerprint(plan) != before:
                    raise UserError(
                        "a model changed while it was merged", where=out, hint="run the same command again"
                    )
                clear_partials(work)
                claimed.publish(work)
            except (UserError, OSError):
                # What was wrong will be wrong again; an interruption is no error and keeps the work.
                shutil.rmtree(work, ignore_errors=True)
                raise
        return report
    finally:
        plan.close()


def _fingerprint(plan: MergePlan) -> str:
    """Of the configuration and of the models' files as they are."""
    files = sorted({entry.file for one in plan.inputs() for entry in one.values()})
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = [JOURNAL, plan.config.to_json(), state]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "backslashreplace")).hexdigest()


def _run(plan: MergePlan, work: Path, threads: int, on_progress: Any) -> dict[str, Any]:
    journal = work / "journal.jsonl"
    fingerprint = _fingerprint(plan)
    lines = read_journal(journal)
    if lines and lines[0].get("fingerprint") == fingerprint:
        entered = {name: entry for line in lines[1:] for name, entry in line.items()}
    else:
        if os.path.lexists(work):
            remove(work)
        entered = {}
    work.mkdir(exist_ok=True)
    budget = ByteBudget(memory_budget(plan, threads))
    writer = CheckpointWriter(
        work, plan.layout, max_shard_bytes=plan.config.max_shard_bytes, resume=bool(entered)
    )
    done = {name: entered[name]["figures"] for name in plan.layout if _holds(writer, name, entered.get(name))}
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
            if not journal.stat().st_size:
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
                    figures = merge_tensor(plan, writer, name)
                    seal = _seal(figures, writer.checksum(name))
                with lock:
                    done[name] = figures
                    pending[name] = {"figures": figures, "seal": seal}
                    written += writer.entries[name].nbytes
                    if written >= SYNC_BYTES and (entering is None or entering.done()):
                        if entering is not None:
                            entering.result()
                        # The disk works while the next tensors are merged.
                        entering = syncing.submit(enter, dict(pending))
                        pending.clear()
                        written = 0
                    if on_progress is not None:
                        on_progress(len(done), len(plan.layout))

            # One thread of torch in each worker: they would wait for each other.
            torch.set_num_threads(1)
            with ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(worker_count(plan, threads)) as pool:
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


def _holds(writer: CheckpointWriter, name: str, entry: Any) -> bool:
    """Return whether the file holds the bytes of the tensor in a journal's entry.

    Files may be lost, cut or changed while nobody merges.
    """
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("figures"), dict)
        and entry.get("seal") == _seal(entry["figures"], writer.checksum(name))
    )


def _seal(figures: dict[str, Any], checksum: int) -> int:
    """A checksum over a tensor's bytes and what the report says of it."""
    return zlib.crc32(json.dumps(figures, sort_keys=True).encode(), checksum)


def _merge_module(plan: MergePlan, work: Path, name: str) -> dict[str, Any]:
    """Merge the weights of a sub-folder; return the figures of its tensors.

    They are written to a folder of their own, which then replaces the weights that were carried.
    """
    place = work / MODULES / name
    place.parent.mkdir(parents=True, exist_ok=True)
    report = _run(plan, place, 1, None)
    for file in weight_files(work / name):
        file.unlink()
    for file in sorted(place.glob("*.safetensors*")):
        file.replace(work / name / file.name)
    return report


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Say the weights' dtype, on top and in the configurations inside that say one."""
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)


def _finish(plan: MergePlan, work: Path, report: dict[str, Any]) -> None:
    """The files beside the weights."""
    from koine.combine.merging.model_card import model_card

    source = plan.models[0].path
    report["left_behind"] = carry_files(source, work)
    carry_drawn((one.path for one in plan.inputs()), work)
    config = model_configuration(source)
    if plan.config.dtype is not None:
        _set_dtype(config, plan.config.dtype)
    if plan.vocabularies or plan.tokenizer != source:
        write_tokenizer(plan.tokenizer, work, config)
    if config:
        write_json(work / "config.json", config)
    if plan.modules:
        report["modules"] = {name: _merge_module(one, work, name) for name, one in plan.modules.items()}
        shutil.rmtree(work / MODULES)
    report |= {
        "config": plan.config.to_json(),
        "models": [
            {"path": str(one.path), "bytes": sum(entry.nbytes for entry in one.values())}
            for one in plan.inputs()
        ],
        "estimated_from": f"at most {SAMPLED} entries of each tensor",
    }
    write_json(work / "merge_report.json", report)
    write_atomically(work / "README.md", model_card(plan.config, plan.info.source))
    seal_folder(work)
    (work / "journal.jsonl").unlink()
