"""Merging of whole checkpoints: tensor by tensor, a piece at a time, on several threads, resumable.

Work is done beside `out`, in `.NAME.merge`, whose journal says what is finished; the same command goes on there after an interruption. Elementwise methods work on
blocks of rows, the others on one tensor of each model at a time.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.methods import METHODS, MethodInfo
from koine.combine.tensor_files import Checkpoint, CheckpointWriter, Entry
from koine.combine.vocabularies import Vocabularies, align, is_vocabulary_tensor
from koine.errors import UserError, did_you_mean
from koine.files import disk_errors, exclusive, fsync_tree, publish_directory, read_json, write_json
from koine.model.mixture_files import carry_mixture_files

BLOCK_ENTRIES = 2**21
"""Entries of an elementwise method's block."""

SYNC_BYTES = 512 * 2**20
"""So many bytes are written between two entries of the journal."""

SAMPLED = 65_536
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


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is merged, and how.

    weights: one a model. weights_for: pairs of a pattern (`model.layers.[0-3].*`) and the weights of the tensors that it names; the first that fits counts.
    tokenizer: `first`, `base`, or `union`: whose vocabulary the result has, where the models' differ; empty: they must not differ.
    options: the method's own numbers. dtype: of the result; None: the first model's.
    """

    method: str
    models: tuple[Path, ...]
    base: Path | None = None
    weights: tuple[float, ...] = ()
    weights_for: tuple[tuple[str, tuple[float, ...]], ...] = ()
    options: Mapping[str, float | bool] = field(default_factory=dict)
    seed: int = 0
    tokenizer: str = ""
    dtype: str | None = None
    max_shard_bytes: int = 5_000_000_000

    def to_json(self) -> dict[str, Any]:
        """As JSON, paths as text."""
        content = asdict(self)
        content["models"] = [str(path) for path in self.models]
        content["base"] = None if self.base is None else str(self.base)
        content["options"] = dict(self.options)
        return content

    def method_info(self) -> MethodInfo:
        """The method; raises `UserError` for one that does not exist."""
        if self.method not in METHODS:
            raise UserError(f"unknown method '{self.method}'", mend=did_you_mean(self.method, METHODS))
        return METHODS[self.method]


@dataclass(frozen=True)
class Need:
    """What a merge will take."""

    peak_memory_bytes: int
    seconds: float
    output_bytes: int
    tensors: int


@dataclass
class Plan:
    """The opened models, and the layout of the result."""

    recipe: Recipe
    info: MethodInfo
    models: list[Checkpoint]
    base: Checkpoint | None
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    vocabularies: Vocabularies | None

    def everyone(self) -> list[Checkpoint]:
        """The models, and the base last where there is one."""
        return self.models if self.base is None else [*self.models, self.base]

    def weights_of(self, name: str) -> tuple[float, ...]:
        """The models' weights for a tensor."""
        for pattern, weights in self.recipe.weights_for:
            if fnmatch.fnmatchcase(name, pattern):
                return weights
        return self.recipe.weights

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.everyone():
            checkpoint.close()


def plan_merge(recipe: Recipe) -> Plan:
    """Open and check everything. Raises `UserError` where the models do not fit together or the recipe does not fit the method."""
    info = recipe.method_info()
    _check(recipe, info)
    models = [Checkpoint(path) for path in recipe.models]
    base = None if recipe.base is None else Checkpoint(recipe.base)
    everyone = models if base is None else [*models, base]
    kinds = {one.path: _config(one.path).get("model_type") for one in everyone}
    first = models[0]
    for one in everyone[1:]:
        if kinds[one.path] != kinds[first.path]:
            raise UserError(
                f"is a {kinds[one.path]}, and {first.path} a {kinds[first.path]}",
                where=one.path,
                mend="models of one architecture can be merged",
            )
    vocabularies = align([one.path for one in everyone], with_base=base is not None, policy=recipe.tokenizer)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    tied = {name for name in ("lm_head.weight",) if _tied(first.path)}
    names = [name for name in first if name not in tied and not name.endswith("rotary_emb.inv_freq")]
    for one in everyone[1:]:
        missing = [name for name in names if name not in one]
        extra = [
            name
            for name in one
            if name not in first and name not in tied and not name.endswith("rotary_emb.inv_freq")
        ]
        if missing or extra:
            raise UserError(
                f"lacks {missing[0]}" if missing else f"has {extra[0]}, which {first.path} lacks",
                where=one.path,
                mend="models of one architecture and size can be merged",
            )
    for name in names:
        entries = [one[name] for one in everyone]
        shape = entries[0].shape
        if vocabularies is not None and is_vocabulary_tensor(name, entries):
            shape = (vocabularies.rows, *shape[1:])
        else:
            _same_shape(name, everyone)
        _same_kind(name, everyone)
        dtype = entries[0].dtype
        if recipe.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, recipe.dtype)
        layout[name] = (dtype, shape)
    for pattern, _ in recipe.weights_for:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"no tensor is named '{pattern}'",
                where="--weights-for",
                mend=f"names are like {names[len(names) // 2]}",
            )
    return Plan(recipe, info, models, base, layout, vocabularies)


def _check(recipe: Recipe, info: MethodInfo) -> None:
    least, most = info.models
    count = len(recipe.models)
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"at least {least}"
        raise UserError(f"{recipe.method} merges {wanted} models, and {count} are given")
    if info.takes("base") != (recipe.base is not None):
        raise UserError(
            f"{recipe.method} needs the common ancestor"
            if info.takes("base")
            else f"{recipe.method} uses no base",
            mend="give --base MODEL" if info.takes("base") else "leave --base out",
        )
    for weights in (recipe.weights, *(weights for _, weights in recipe.weights_for)):
        if not info.takes("weights"):
            if weights:
                raise UserError(f"{recipe.method} uses no weights", mend="leave --weights out")
            continue
        if len(weights) != count:
            raise UserError(
                f"{len(weights)} weights for {count} models", mend="give one each, with commas between"
            )
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"the weights are {', '.join(map(str, weights))}", mend="they must be numbers")
        divided = recipe.options.get(
            "normalize", info.parameters.get("normalize") and info.parameters["normalize"].default
        )
        if divided and abs(sum(weights)) < 1e-8:
            raise UserError(
                "the weights sum to 0", mend="they are divided by their sum: choose others, or --no-normalize"
            )
    for name in recipe.options:
        if name not in info.parameters:
            raise UserError(
                f"{recipe.method} has no option '{name}'", mend=did_you_mean(name, info.parameters)
            )
    for name, parameter in info.parameters.items():
        if name not in recipe.options and parameter.default is parameter.empty:
            raise UserError(f"{recipe.method} needs --{name}", mend=f"for example --{name} 0.5")
    density = recipe.options.get("density")
    if density is not None and not 0.0 < density <= 1.0:
        raise UserError(f"the density is {density}", mend="it must be above 0 and at most 1")
    if recipe.dtype is not None and recipe.dtype not in ("float32", "bfloat16", "float16", "float64"):
        raise UserError(
            f"unknown dtype '{recipe.dtype}'",
            mend=did_you_mean(recipe.dtype, ("float32", "bfloat16", "float16")),
        )


def _config(path: Path) -> dict[str, Any]:
    content = read_json(path / "config.json") if (path / "config.json").exists() else {}
    if not isinstance(content, dict):
        raise UserError(
            "is not a JSON object", where=path / "config.json", mend="it is no model's configuration"
        )
    return content


def _tied(path: Path) -> bool:
    content = _config(path)
    own_default = content.get("model_type") in ("cohere", "cohere2", "gemma", "gemma2", "gemma3_text")
    return bool(content.get("tie_word_embeddings", own_default))


def _same_shape(name: str, everyone: Sequence[Checkpoint]) -> None:
    for one in everyone[1:]:
        if one[name].shape != everyone[0][name].shape:
            raise UserError(
                f"{name} has shape {list(one[name].shape)}, and {list(everyone[0][name].shape)} in {everyone[0].path}",
                where=one.path,
                mend="models of one size can be merged",
            )


def _same_kind(name: str, everyone: Sequence[Checkpoint]) -> None:
    for one in everyone[1:]:
        dtypes = (everyone[0][name].dtype, one[name].dtype)
        if dtypes[0] != dtypes[1] and not all(dtype.is_floating_point for dtype in dtypes):
            raise UserError(
                f"{name} is {dtypes[1]}, and {dtypes[0]} in {everyone[0].path}".replace("torch.", ""),
                where=one.path,
                mend="whole numbers are copied where they are equal, and not merged",
            )


def need(plan: Plan, threads: int) -> Need:
    """What the merge will take, from the sizes of its tensors and rates seen on two cores."""
    sizes = {name: torch.Size(shape).numel() for name, (_, shape) in plan.layout.items()}
    output = sum(sizes[name] * dtype.itemsize for name, (dtype, _) in plan.layout.items())
    copies = len(plan.everyone()) + 1
    largest = max(plan.layout, key=lambda name: sizes[name])
    itemsize = plan.models[0][largest].dtype.itemsize
    if plan.info.elementwise and plan.vocabularies is None:
        working = threads * BLOCK_ENTRIES * (copies * itemsize + (copies + 2) * 4)
    else:
        # The largest tensor of every model, one wide copy of it, and a block of each.
        working = sizes[largest] * (copies * itemsize + 4) + threads * BLOCK_ENTRIES * (copies + 2) * 4
    rate = {
        "linear": 4e8,
        "slerp": 2e8,
        "task-arithmetic": 3e8,
        "ties": 6e7,
        "dare-linear": 8e7,
        "dare-ties": 6e7,
    }
    entries = sum(sizes.values()) * len(plan.models)
    return Need(
        300 * 2**20 + working, 2.0 + entries / rate.get(plan.recipe.method, 1e8), output, len(plan.layout)
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
    plan = plan_merge(recipe)
    workers = threads or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
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
    if journal.exists():
        lines = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
        if lines and lines[0].get("fingerprint") == fingerprint:
            done = {name: figures for line in lines[1:] for name, figures in line.items()}
        else:
            shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    writer = CheckpointWriter(
        work, plan.layout, max_shard_bytes=plan.recipe.max_shard_bytes, resume=journal.exists()
    )
    lock, pending, written = threading.Lock(), dict[str, Any](), 0
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

            def flush() -> None:
                writer.sync()
                log.write(json.dumps(pending) + "\n")
                log.flush()
                os.fsync(log.fileno())
                pending.clear()

            def one(name: str) -> None:
                nonlocal written
                figures = _merge_tensor(plan, writer, name)
                with lock:
                    done[name] = pending[name] = figures
                    written += writer.entries[name].nbytes
                    if written >= SYNC_BYTES:
                        flush()
                        written = 0
                    if say is not None:
                        say(len(done), len(plan.layout))

            # One thread of torch in each worker: they would wait for each other.
            torch.set_num_threads(1)
            with ThreadPoolExecutor(threads) as pool:
                futures = [pool.submit(one, name) for name in todo]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    if pending:
                        flush()
                    raise
            flush()
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
    if plan.vocabularies is not None and is_vocabulary_tensor(name, entries):
        tensors = [one.read(name) for one in everyone]
        for one, tensor in zip(everyone, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        writer.write(name, _by_token(plan, name, tensors).to(dtype))
        return {}
    if not plan.info.elementwise:
        tensors = [one.read(name) for one in everyone]
        for one, tensor in zip(everyone, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        writer.write(name, apply_method(plan, name, tensors, block=0).to(dtype))
        return figures_of(tensors, plan)
    entry = entries[0]
    rows = max(1, BLOCK_ENTRIES // max(1, entry.row))
    sampled: list[list[Tensor]] = []
    for number, start in enumerate(range(0, entry.rows, rows)):
        stop = min(entry.rows, start + rows)
        tensors = [one.read(name, start, stop) for one in everyone]
        for one, tensor in zip(everyone, tensors, strict=True):
            _refuse_not_finite(tensor, name, one.path)
        writer.write(name, apply_method(plan, name, tensors, block=number).to(dtype), start)
        sampled.append([_sample(tensor, entry) for tensor in tensors])
    return figures_of([torch.cat(parts) for parts in zip(*sampled, strict=True)], plan) if sampled else {}


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
        if not any(weight for weight, _ in given):
            given = [(1.0, tensor) for _, tensor in given]
        total = sum(weight for weight, _ in given)
        out[row] = sum(tensor.float() * (weight / total) for weight, tensor in given).to(out.dtype)  # type: ignore[union-attr]
    return out


def _refuse_not_finite(tensor: Tensor, name: str, path: Path) -> None:
    # The sum is finite where every entry is; only where it is not, the entries are looked at (large ones may overflow it).
    if not math.isfinite(float(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
        raise UserError(
            f"{name} holds NaN or infinity", where=path, mend="this checkpoint is broken; use an earlier one"
        )


def _sample(tensor: Tensor, entry: Entry) -> Tensor:
    stride = max(1, entry.numel // SAMPLED) | 1
    return tensor.reshape(-1)[::stride].clone()


def figures_of(tensors: Sequence[Tensor], plan: Plan) -> dict[str, Any]:
    """How far apart the models are in one tensor, from a sample of its entries.

    distance: of each model from the base (from their mean, where there is none), relative to its norm. cosine: the least between two models' differences.
    sign_conflicts: share of the entries in which not all differences have one sign.
    """
    stride = max(1, tensors[0].numel() // SAMPLED) | 1
    parts = [tensor.reshape(-1)[::stride].float() for tensor in tensors]
    origin = parts.pop() if plan.base is not None else torch.stack(parts).mean(dim=0)
    deltas = [part - origin for part in parts]
    norm = float(origin.norm())
    figures: dict[str, Any] = {
        "distance": [round(float(delta.norm()) / norm, 6) if norm else None for delta in deltas]
    }
    if plan.base is not None and len(deltas) > 1:
        cosines = [
            float(torch.cosine_similarity(deltas[a], deltas[b], dim=0))
            for a in range(len(deltas))
            for b in range(a)
        ]
        signs = torch.stack([delta.sign() for delta in deltas])
        conflicts = (signs.amax(dim=0) > 0) & (signs.amin(dim=0) < 0)
        figures |= {
            "cosine": round(min(cosines), 6),
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
    config = _config(source)
    if plan.recipe.dtype is not None:
        config["dtype"] = plan.recipe.dtype
        config.pop("torch_dtype", None)
    if plan.vocabularies is not None:
        plan.vocabularies.write(work, config)
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
