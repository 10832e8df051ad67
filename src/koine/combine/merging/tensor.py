"""Merge one tensor: read the models' tensors in blocks, apply the method, write the result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from koine.combine.merging.methods import BLOCK
from koine.combine.merging.tensor_job import IN_MEMORY_ENTRIES, TensorJob, check_finite, is_finite
from koine.combine.merging.vocabulary_alignment import VocabularyAlignment
from koine.errors import UserError
from koine.model.formats.safetensors_stream import CheckpointWriter, contiguous_runs

SAMPLED = 32_768
"""Entries of each tensor from which the report's figures are estimated."""


def merge_tensor(job: TensorJob, writer: CheckpointWriter) -> dict[str, Any]:
    """Merge the tensors of one name, write the result, and return its figures for the report.

    Raises `UserError` where a tensor holds NaN or infinity, the result does, or integers differ.
    """
    if not job.dtype.is_floating_point:
        writer.write(job.name, _equal_tensor(job))
        return {}
    if job.alignment is not None:
        _merge_by_token(job, job.alignment, writer)
        return {}
    if not job.method.elementwise:
        inputs = _inputs(job)
        _write(job, writer, apply_method(job, inputs, block=0))
        return difference_figures(inputs, has_base=job.has_base) if job.numel else {}
    return _merge_in_blocks(job, writer)


def _equal_tensor(job: TensorJob) -> Tensor:
    """Return an integer tensor, which must be the same in all models."""
    first = job.checkpoints[0].read(job.name)
    for checkpoint in job.checkpoints[1:]:
        if not torch.equal(checkpoint.read(job.name), first):
            raise UserError(
                f"{job.name} holds integers and differs from that of {job.checkpoints[0].path}",
                where=checkpoint.path,
                hint="integers are copied where they are equal, and not merged",
            )
    return first


def _inputs(job: TensorJob, rows: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Return the models' tensors for a method of several passes.

    Small tensors are in memory. Larger ones are read where they are sliced.

    Args:
        job: The tensor.
        rows: `[n]` for each model, which of its rows; None: all.
    """
    stored = [
        job.stored(index, None if rows is None else rows[index]) for index in range(len(job.checkpoints))
    ]
    in_memory = stored[0].numel() <= IN_MEMORY_ENTRIES
    return [one[:] for one in stored] if in_memory else cast("list[Tensor]", stored)


def _merge_in_blocks(job: TensorJob, writer: CheckpointWriter) -> dict[str, Any]:
    """Merge elementwise, some rows at a time; return the figures of a sample."""
    entry = job.entries[0]
    rows = max(1, BLOCK // max(1, entry.row))
    stride = sample_stride(entry.numel)
    # Each block may add one entry more than its share. The room for the whole sample is taken before the
    # first block: small tensors that stay between large ones that go fragment the heap.
    room = entry.numel // stride + -(-entry.rows // rows) + 1
    samples = [torch.empty(room, dtype=one.dtype) for one in job.entries]
    filled = 0
    for number, start in enumerate(range(0, entry.rows, rows)):
        stop = min(entry.rows, start + rows)
        tensors = [one.read(job.name, start, stop) for one in job.checkpoints]
        for checkpoint, tensor in zip(job.checkpoints, tensors, strict=True):
            check_finite(tensor, job.name, checkpoint.path)
        inputs = [tensor.to(dtype) for tensor, dtype in zip(tensors, job.read_dtypes, strict=True)]
        _write(job, writer, apply_method(job, inputs, block=number), start)
        parts = [tensor.reshape(-1)[::stride] for tensor in tensors]
        for sample, part in zip(samples, parts, strict=True):
            sample[filled : filled + part.numel()] = part
        filled += parts[0].numel()
    if not filled:
        return {}
    return difference_figures([sample[:filled] for sample in samples], has_base=job.has_base)


def apply_method(job: TensorJob, tensors: Sequence[Tensor], *, block: int) -> Tensor:
    """Apply the method to the models' tensors, or to a block of them (the base's last)."""
    arguments: dict[str, Any] = dict(job.options)
    models = list(tensors)
    if job.has_base:
        arguments["base"] = models.pop()
    if job.method.takes("weights"):
        arguments["weights"] = job.weights
    if job.method.takes("generator"):
        # Seeded by the tensor and the block, so that the order of the work changes nothing.
        text = f"{job.seed} {job.name} {block}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return job.method.function(models, **arguments)


def _merge_by_token(job: TensorJob, alignment: VocabularyAlignment, writer: CheckpointWriter) -> None:
    """Merge a tensor with one row per token, of models with different vocabularies.

    Rows that all models have are merged by the method. Every other row is the average of the models that
    have it, by their weights.
    """
    shared = alignment.shared
    count, row = len(shared), max(1, job.entries[0].row)
    rows_at_once = max(1, BLOCK // row)
    if job.method.elementwise:
        stored = [job.stored(index, rows) for index, rows in enumerate(alignment.positions)]
        for number, start in enumerate(range(0, count, rows_at_once)):
            stop = min(count, start + rows_at_once)
            parts = [one[start * row : stop * row].view(-1, *one.shape[1:]) for one in stored]
            merged = apply_method(job, parts, block=number)
            _write_rows(job, writer, shared[start:stop], merged)
    elif count:
        merged = apply_method(job, _inputs(job, alignment.positions), block=0)
        _write_rows(job, writer, shared, merged.view(count, *job.entries[0].shape[1:]))
    for start in range(0, len(alignment.partial), rows_at_once):
        some = alignment.partial[start : start + rows_at_once]
        rows = torch.tensor([number for number, _ in some])
        _write_rows(job, writer, rows, torch.stack([_mean_row(job, holders) for _, holders in some]))


def _mean_row(job: TensorJob, holders: Sequence[tuple[int, int]]) -> Tensor:
    """Return the average of a row that not all models have, by the models' weights.

    Args:
        job: The tensor.
        holders: The models that have the row, as pairs `(model, row)`.
    """
    count = len(job.checkpoints) - job.has_base
    weights = job.weights if job.method.takes("weights") else (1.0,) * count
    rows = []
    for model, position in holders:
        [row] = job.checkpoints[model].read(job.name, position, position + 1)
        check_finite(row, job.name, job.checkpoints[model].path)
        rows.append((weights[model] if model < len(weights) else 0.0, row))
    if abs(sum(weight for weight, _ in rows)) < 1e-8:
        # The weights of these models cancel out, or are 0. They say nothing about a row that others lack.
        rows = [(1.0, row) for _, row in rows]
    total = sum(weight for weight, _ in rows)
    mean = torch.stack(
        [row.to(torch.promote_types(row.dtype, torch.float32)) * (weight / total) for weight, row in rows]
    ).sum(dim=0)
    return mean.to(job.read_dtypes[0])


def _write_rows(job: TensorJob, writer: CheckpointWriter, rows: Tensor, values: Tensor) -> None:
    """Write `values` as the ascending `rows` of the result; neighbouring rows at once."""
    checked = _to_result_dtype(job, values)
    for start, stop in contiguous_runs(rows):
        writer.write(job.name, checked[start:stop], int(rows[start]))


def _write(job: TensorJob, writer: CheckpointWriter, result: Tensor, start: int = 0) -> None:
    """Write a result, or its rows from `start` on."""
    writer.write(job.name, _to_result_dtype(job, result), start)


def _to_result_dtype(job: TensorJob, result: Tensor) -> Tensor:
    """Convert to the dtype of the result; raise `UserError` where a value is too large for it."""
    converted = result.to(job.dtype)
    if not is_finite(converted):
        raise UserError(
            f"the merged {job.name} holds NaN or infinity as {str(job.dtype).removeprefix('torch.')}",
            hint="the weights or the scale are too large, or --dtype too narrow",
        )
    return converted


def sample_stride(numel: int) -> int:
    """Return the step with which entries are sampled: odd, so that no column of a matrix is preferred."""
    return max(1, numel // SAMPLED) | 1


def difference_figures(tensors: Sequence[Tensor], *, has_base: bool) -> dict[str, Any]:
    """Compute how far apart the models are in one tensor, from a sample of its entries.

    Args:
        tensors: The models' tensors; the base's last, where there is one.
        has_base: Whether there is one.

    Returns:
        `distance`: of each model from the base (from the models' mean, where there is none), relative to
        its norm. With a base and several models also `cosine`: the least between two models' differences,
        and `sign_conflicts`: the share of entries in which the differences do not all have one sign.
    """
    stride = sample_stride(tensors[0].numel())
    parts = torch.stack([tensor.reshape(-1)[::stride].float() for tensor in tensors])
    origin = parts[-1] if has_base else parts.mean(dim=0)
    deltas = (parts[:-1] if has_base else parts) - origin
    norm, norms = float(origin.norm()), deltas.norm(dim=1)
    figures: dict[str, Any] = {
        "distance": [round(value / norm, 6) if norm else None for value in norms.tolist()]
    }
    if has_base and len(deltas) > 1:
        unit = deltas / norms.clamp_min(1e-12)[:, None]
        above, below = torch.triu_indices(len(deltas), len(deltas), offset=1)
        conflicts = (deltas.amax(dim=0) > 0) & (deltas.amin(dim=0) < 0)
        figures |= {
            "cosine": round(float((unit @ unit.T)[above, below].min()), 6),
            "sign_conflicts": round(float(conflicts.float().mean()), 6),
        }
    return figures
