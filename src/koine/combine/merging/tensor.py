"""One tensor of a merge: read from all models a block at a time, merged, checked, and written; and the figures of the report.

Elementwise methods work on blocks of rows; the others walk through one tensor of each model, in blocks too, and hold the result of it. Where vocabularies
differ, the rows of embeddings are read where each model keeps them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from koine.combine.merging.budget import WHOLE_ENTRIES
from koine.combine.merging.methods import BLOCK
from koine.combine.merging.plan import MergePlan
from koine.combine.safetensors_stream import (
    Checkpoint,
    CheckpointWriter,
    Entry,
    StoredTensor,
    contiguous_runs,
)
from koine.errors import UserError

SAMPLED = 32_768
"""Entries of each tensor from which the report's figures are estimated."""


def merge_tensor(plan: MergePlan, writer: CheckpointWriter, name: str) -> dict[str, Any]:
    """Merge the tensors of one name and write the result; its figures for the report."""
    inputs = plan.inputs()
    entries = [one[name] for one in inputs]
    dtype, _ = plan.layout[name]
    if not dtype.is_floating_point:
        first = inputs[0].read(name)
        for one in inputs[1:]:
            if not torch.equal(one.read(name), first):
                raise UserError(
                    f"{name} is of integers and differs from that of {inputs[0].path}",
                    where=one.path,
                    hint="integers are copied where they are equal, and not merged",
                )
        writer.write(name, first)
        return {}
    if name in plan.vocabularies:
        _merge_by_token(plan, writer, name)
        return {}
    if not plan.info.elementwise:
        stored = [_stored(plan, one, name) for one in inputs]
        # Several passes over a small tensor are made in memory.
        small = entries[0].numel <= WHOLE_ENTRIES
        given = [one[:] for one in stored] if small else cast("list[Tensor]", stored)
        _write(writer, name, apply_method(plan, name, given, block=0), dtype)
        return figures_of(given, plan) if entries[0].numel else {}
    entry = entries[0]
    rows = max(1, BLOCK // max(1, entry.row))
    # Room for the whole sample before the first block: what is small and kept between large blocks that come and go tears the heap apart.
    sampled = [_room(entry, tensor_dtype=one[name].dtype, rows=rows) for one in inputs]
    filled = 0
    for number, start in enumerate(range(0, entry.rows, rows)):
        stop = min(entry.rows, start + rows)
        tensors = [one.read(name, start, stop) for one in inputs]
        for one, tensor in zip(inputs, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        read_as = [tensor.to(plan.dtype_read(name, tensor.dtype)) for tensor in tensors]
        _write(writer, name, apply_method(plan, name, read_as, block=number), dtype, start)
        parts = [tensor.reshape(-1)[:: _stride(entry.numel)] for tensor in tensors]
        for kept, part in zip(sampled, parts, strict=True):
            kept[filled : filled + part.numel()] = part
        filled += parts[0].numel()
    return figures_of([kept[:filled] for kept in sampled], plan) if filled else {}


def _stored(plan: MergePlan, checkpoint: Checkpoint, name: str, rows: Tensor | None = None) -> StoredTensor:
    def check(part: Tensor) -> None:
        _refuse_not_finite(part, name, checkpoint.path)

    return StoredTensor(checkpoint, name, check, rows, plan.dtype_read(name, checkpoint[name].dtype))


def apply_method(plan: MergePlan, name: str, tensors: Sequence[Tensor], *, block: int) -> Tensor:
    """The method on the models' tensors, or on a block of them (the base's last, where there is one)."""
    arguments: dict[str, Any] = dict(plan.config.options)
    models = list(tensors)
    if plan.base is not None:
        arguments["base"] = models.pop()
    if plan.info.takes("weights"):
        arguments["weights"] = plan.weights_of(name)
    if plan.info.takes("generator"):
        # Of the tensor and the block, so that the order of the work changes nothing.
        text = f"{plan.config.seed} {name} {block}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
        arguments["generator"] = torch.Generator().manual_seed(seed)
    return plan.info.function(models, **arguments)


def _merge_by_token(plan: MergePlan, writer: CheckpointWriter, name: str) -> None:
    """Rows that all models have are merged; of the others the models that have one are averaged by their weights."""
    inputs, vocabularies = plan.inputs(), plan.vocabularies[name]
    dtype, _ = plan.layout[name]
    stored = [_stored(plan, one, name, rows) for one, rows in zip(inputs, vocabularies.places, strict=True)]
    count, row = len(vocabularies.shared), max(1, inputs[0][name].row)
    block = max(1, BLOCK // row)
    if plan.info.elementwise:
        for number, start in enumerate(range(0, count, block)):
            stop = min(count, start + block)
            parts = [one[start * row : stop * row].view(-1, *one.shape[1:]) for one in stored]
            merged = apply_method(plan, name, parts, block=number)
            _write_rows(writer, name, vocabularies.shared[start:stop], merged, dtype)
    elif count:
        small = count * row <= WHOLE_ENTRIES
        given = [one[:] for one in stored] if small else cast("list[Tensor]", stored)
        merged = apply_method(plan, name, given, block=0).view(stored[0].shape)
        _write_rows(writer, name, vocabularies.shared, merged, dtype)
    weights = plan.weights_of(name) if plan.info.takes("weights") else (1.0,) * len(plan.models)
    for start in range(0, len(vocabularies.alone), block):
        some = vocabularies.alone[start : start + block]
        rows = torch.tensor([number for number, _ in some])
        mean = torch.stack([_mean_of_holders(plan, name, holders, weights) for _, holders in some])
        _write_rows(writer, name, rows, mean, dtype)


def _mean_of_holders(
    plan: MergePlan, name: str, holders: Sequence[tuple[int, int]], weights: Sequence[float]
) -> Tensor:
    """The row that some of the models have, `(model, place)` of each."""
    inputs = plan.inputs()
    given = []
    for model, place in holders:
        [row] = inputs[model].read(name, place, place + 1)
        _refuse_not_finite(row, name, inputs[model].path)
        given.append((weights[model] if model < len(weights) else 0.0, row))
    if abs(sum(weight for weight, _ in given)) < 1e-8:
        # The weights of these models cancel out, or are 0: they say nothing about a row that the others lack.
        given = [(1.0, row) for _, row in given]
    total = sum(weight for weight, _ in given)
    mean = torch.stack(
        [row.to(torch.promote_types(row.dtype, torch.float32)) * (weight / total) for weight, row in given]
    ).sum(dim=0)
    return mean.to(plan.dtype_read(name, inputs[0][name].dtype))


def _write_rows(
    writer: CheckpointWriter, name: str, rows: Tensor, values: Tensor, dtype: torch.dtype
) -> None:
    """Write `values` as the ascending `rows` of the result; those that lie together at once."""
    checked = _cast(name, values, dtype)
    for start, stop in contiguous_runs(rows):
        writer.write(name, checked[start:stop], int(rows[start]))


def _write(writer: CheckpointWriter, name: str, result: Tensor, dtype: torch.dtype, start: int = 0) -> None:
    """Write a result, or rows of one, as `dtype`; raises `UserError` where it is too large for that."""
    writer.write(name, _cast(name, result, dtype), start)


def _cast(name: str, result: Tensor, dtype: torch.dtype) -> Tensor:
    cast = result.to(dtype)
    if not _finite(cast):
        raise UserError(
            f"the merged {name} holds NaN or infinity as {str(dtype).removeprefix('torch.')}",
            hint="the weights or the scale are too large, or --dtype too narrow",
        )
    return cast


def _refuse_not_finite(tensor: Tensor, name: str, path: Path) -> None:
    if not _finite(tensor):
        raise UserError(
            f"{name} holds NaN or infinity", where=path, hint="this checkpoint is broken; use an earlier one"
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


def figures_of(tensors: Sequence[Tensor], plan: MergePlan) -> dict[str, Any]:
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
