"""Run a merge: tensor by tensor, a block at a time, on several threads, resumable.

Work is done beside `out`, in `.NAME.merge`. Its journal says what is finished, and the same command goes on
there after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from koine.combine.compatibility import model_configuration
from koine.combine.merging.budget import ByteBudget, memory_budget, worker_count
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.journal import Journal, is_written, read_entries
from koine.combine.merging.plan import MergePlan, plan_merge
from koine.combine.merging.tensor import SAMPLED, merge_tensor
from koine.combine.merging.tensor_job import TensorJob
from koine.combine.merging.tokenizers import write_tokenizer
from koine.data.drawn import carry_drawn
from koine.errors import UserError
from koine.files import check_inside, claim, clear_partials, remove, write_json
from koine.hardware import usable_cores
from koine.model.formats.carried_files import carry_files
from koine.model.formats.checksum import write_checksums
from koine.model.formats.model_card import write_model_card
from koine.model.formats.safetensors_stream import CheckpointWriter
from koine.model.formats.weight_files import weight_files

JOURNAL_VERSION = 2
"""Version of the journal's entries, a part of the fingerprint."""

SYNC_BYTES = 64 * 2**20
"""Bytes of weights, at least, between two entries of the journal."""

MODULES = ".modules"
"""The folder inside the work's in which weights of sub-folders are merged."""

OnProgress = Callable[[int, int], None]
"""Called with the number of tensors that are done, and of all."""


def run_merge(
    config: MergeConfig,
    out: Path,
    *,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge into the new folder `out`; return the report, which is also `merge_report.json` there.

    Args:
        config: What is merged, and how.
        out: The folder to write.
        threads: Tensors merged at a time; default: the cores.
        on_progress: Called with the number of tensors that are done, and of all.
        overwrite: Replace what stands at `out`.

    Raises:
        UserError: The models do not fit together, a tensor holds NaN or infinity, `out` holds something
            (without `overwrite`), a model changes meanwhile, or the disk is full. Nothing half-written is
            then left. An interruption leaves the work beside `out`, and the same call goes on there.
    """
    out = Path(out)
    reads = [*config.models, *([] if config.base is None else [config.base])]
    check_inside(out, reads)
    plan = plan_merge(config)
    try:
        with claim(out, overwrite=overwrite, reads=reads) as claimed:
            work = claimed.beside("merge")
            try:
                before = _fingerprint(plan)
                tensors = _merge_weights(plan, work, threads or usable_cores(), on_progress)
                report = _write_other_files(plan, work, tensors)
                if _fingerprint(plan) != before:
                    raise UserError(
                        "a model changed while it was merged", where=out, hint="run the same command again"
                    )
                clear_partials(work)
                claimed.publish(work)
            except (UserError, OSError):
                # What was wrong will be wrong again. An interruption is no error and keeps the work.
                shutil.rmtree(work, ignore_errors=True)
                raise
        return report
    finally:
        plan.close()


def _fingerprint(plan: MergePlan) -> str:
    """Return a hash of the configuration and of the state of the models' files."""
    files = sorted({entry.file for one in plan.checkpoints for entry in one.values()})
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = [JOURNAL_VERSION, plan.config.to_json(), state]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "backslashreplace")).hexdigest()


def _merge_weights(
    plan: MergePlan, work: Path, threads: int, on_progress: OnProgress | None
) -> dict[str, dict[str, Any]]:
    """Merge all tensors into files in `work`; return their figures.

    Tensors that an interrupted merge left there are kept where journal and files agree.
    """
    path, fingerprint = work / "journal.jsonl", _fingerprint(plan)
    entries = read_entries(path, fingerprint)
    if entries is None:
        if os.path.lexists(work):
            remove(work)
        entries = {}
    work.mkdir(exist_ok=True)
    writer = CheckpointWriter(
        work, plan.layout, max_shard_bytes=plan.config.max_shard_bytes, resume=bool(entries)
    )
    try:
        done = {
            name: entries[name]["figures"]
            for name in plan.jobs
            if is_written(writer, name, entries.get(name))
        }
        with Journal(path, fingerprint, writer, sync_bytes=SYNC_BYTES) as journal:
            _run_jobs(plan, writer, journal, done, threads, on_progress)
    finally:
        writer.close()
    return {name: done[name] for name in plan.jobs}


def _run_jobs(
    plan: MergePlan,
    writer: CheckpointWriter,
    journal: Journal,
    done: dict[str, dict[str, Any]],
    threads: int,
    on_progress: OnProgress | None,
) -> None:
    """Merge the tensors that are not `done` yet, and add their figures to it."""
    budget, lock = ByteBudget(memory_budget(plan, threads)), threading.Lock()

    def run(job: TensorJob) -> None:
        with budget.hold(job.working_bytes):
            figures = merge_tensor(job, writer)
            journal.add(job.name, figures)
        with lock:
            done[job.name] = figures
            if on_progress is not None:
                on_progress(len(done), len(plan.jobs))

    # The largest first: at the end all threads have something to do.
    todo = sorted((job for job in plan.jobs.values() if job.name not in done), key=lambda job: -job.numel)
    before = torch.get_num_threads()
    # One thread of torch in each worker: they would wait for each other.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(worker_count(plan, threads)) as pool:
            futures = [pool.submit(run, job) for job in todo]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(before)


def _merge_module(plan: MergePlan, work: Path, name: str) -> dict[str, Any]:
    """Merge the weights of a sub-folder, in place of those that were copied; return their figures."""
    place = work / MODULES / name
    place.parent.mkdir(parents=True, exist_ok=True)
    tensors = _merge_weights(plan, place, 1, None)
    for file in weight_files(work / name):
        file.unlink()
    for file in sorted(place.glob("*.safetensors*")):
        file.replace(work / name / file.name)
    return {"tensors": tensors}


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the weights' dtype in a `config.json`, and in the configurations inside that name one."""
    config["dtype"] = dtype
    config.pop("torch_dtype", None)
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, dtype)


def _write_other_files(plan: MergePlan, work: Path, tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Write the files beside the weights; return the report."""
    from koine.combine.merging.model_card import merge_card

    source = plan.models[0].path
    left_behind = carry_files(source, work)
    carry_drawn((one.path for one in plan.checkpoints), work)
    config = model_configuration(source)
    if plan.config.dtype is not None:
        _set_dtype(config, plan.config.dtype)
    if plan.vocabularies_differ or plan.tokenizer != source:
        write_tokenizer(plan.tokenizer, work, config)
    if config:
        write_json(work / "config.json", config)
    report: dict[str, Any] = {"tensors": tensors, "left_behind": left_behind}
    if plan.modules:
        report["modules"] = {name: _merge_module(one, work, name) for name, one in plan.modules.items()}
        shutil.rmtree(work / MODULES)
    report |= {
        "config": plan.config.to_json(),
        "models": [
            {"path": str(one.path), "bytes": sum(entry.nbytes for entry in one.values())}
            for one in plan.checkpoints
        ],
        "estimated_from": f"at most {SAMPLED} entries of each tensor",
    }
    write_json(work / "merge_report.json", report)
    write_model_card(work, merge_card(plan.config, plan.method.source))
    write_checksums(work)
    (work / "journal.jsonl").unlink()
    return report
