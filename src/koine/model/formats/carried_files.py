"""Copy the files beside a model's weights that a folder made from it needs.

Sentence models have folders of modules (`1_Pooling`, `2_Dense`), chat models templates and processors, and
some models files that only their own tools know.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import warnings
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from koine.data.drawn import FILE as DRAWN
from koine.errors import KoineWarning, UserError
from koine.files import read_json
from koine.model.formats.mixture_files import DOMAIN_ENCODER
from koine.model.formats.weight_files import INDEX, SINGLE

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "source.spm", "target.spm", "tiktoken.model",
)  # fmt: skip
"""Files and folders of a tokenizer, in the formats that `transformers` knows."""

WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt",
    "*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel",
    "*.mlpackage", "*.npz", "*.pkl", "*.pickle", "*.engine",
)  # fmt: skip
"""Files of weights. In a folder that is made from a model they would be the old weights."""

OF_THE_RUN = (
    "README.md", "artifact.json", "example_questions.json", "training.json", DRAWN, "metrics*", "report.json",
    "tensorboard", "runs", "wandb", "mlruns", "tracking.json", "checkpoints", "checkpoint-*", "global_step*",
    "merge*.json", "trainer_state.json",
    "training_args.bin", "optimizer*", "scheduler*", "rng_state*", "scaler*", "all_results.json",
    "train_results.json", "eval_results.json", "zero_to_fp32.py", "latest", "*.lock", "*.partial", "*.log",
    "__pycache__", ".*",
)  # fmt: skip
"""Files about how a model was made, or for training it further."""

REWRITTEN = ("config.json",)
"""Files that every writer of a model writes itself."""


def copy_tokenizer(tokenizer: Path | None, folder: Path) -> None:
    """Copy a tokenizer's files, if one is given, into a model's folder (which may be the same)."""
    if tokenizer is None:
        return
    for name in TOKENIZER_FILES:
        source, target = Path(tokenizer) / name, folder / name
        if source.is_file() and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


def carry_files(
    model: Path, out: Path, *, but: Collection[str] = (), keep: bool = False, warn: bool = True
) -> list[str]:
    """Copy the files beside the weights of `model` into `out`, sub-folders too.

    Weights in sub-folders are copied where they belong to a module of a sentence model, or to a mixture's
    domain encoder. All other weights are the old model's: they are left out with their folder, and a
    `KoineWarning` names them.

    Args:
        model: folder to copy from.
        out: folder to copy to.
        but: names of the top level that are not copied.
        keep: keep files that `out` has already.
        warn: whether to warn.

    Returns:
        Names of the files and folders with weights that were left out.

    Raises:
        OSError: a file cannot be read or written.
    """
    modules = module_folders(model)
    paths = [path for path in carried_paths(model) if path.parts[0] not in (*but, *REWRITTEN)]
    stale = {path for path in paths if _is_weights(path.name) and not _belongs(path, modules)}
    folders = {path.parts[0] for path in stale if len(path.parts) > 1}
    for path in paths:
        target = out / path
        if path in stale or (path.parts[0] in folders and not _belongs(path, modules)):
            continue
        if keep and target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (target.exists() and target.samefile(model / path)):
            shutil.copyfile(model / path, target)
    read = _weights_read(model)
    left = sorted({path.parts[0] for path in stale if len(path.parts) == 1} - read)
    left += sorted(f"{name}/" for name in folders)
    if left and warn:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        warnings.warn(
            f"{model}: left behind, because they hold weights as they were before: {shown}",
            KoineWarning,
            stacklevel=2,
        )
    return left


def carried_paths(model: Path) -> list[PurePosixPath]:
    """Return the files of a model directory, without those of its training, as relative paths.

    Links are followed, each folder once.
    """
    found: list[PurePosixPath] = []
    seen = {model.resolve()}
    for folder, folders, files in os.walk(model, followlinks=True):
        here = Path(folder).relative_to(model)
        kept = []
        for name in sorted(folders):
            place = (Path(folder) / name).resolve()
            if place not in seen and not _matches(name, OF_THE_RUN):
                seen.add(place)
                kept.append(name)
        folders[:] = kept
        patterns = OF_THE_RUN if here == Path() else (".*", "*.lock", "*.partial")
        found += [
            PurePosixPath(here.as_posix(), name)
            for name in sorted(files)
            if not _matches(name, patterns) and (Path(folder) / name).is_file()
        ]
    return sorted(found)


def module_folders(model: Path) -> list[str]:
    """Return the sub-folders of a sentence model's modules, from its `modules.json`; empty for other models.

    Raises `UserError` where that file is damaged or names a folder outside.
    """
    file = model / "modules.json"
    if not file.is_file():
        return []
    content = read_json(file)
    modules = content if isinstance(content, list) else []
    paths = [one.get("path") for one in modules if isinstance(one, dict)]
    if not paths or len(paths) < len(modules) or not all(isinstance(path, str) for path in paths):
        raise UserError("names no modules", where=file, hint="it is damaged; copy the folder again")
    found = [str(path) for path in paths if path]
    for name in found:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"names a folder outside its own, {name!r}", where=file, hint="do not trust this folder"
            )
    return found


def module_weights(model: Path) -> dict[str, list[str]]:
    """Return the module folders that hold weights, with the names of those files."""
    found: dict[str, list[str]] = {}
    for name in module_folders(model):
        folder = model / name
        files = (
            sorted(path.name for path in folder.iterdir() if _is_weights(path.name))
            if folder.is_dir()
            else []
        )
        if files:
            found[name] = files
    return found


def _belongs(path: PurePosixPath, modules: Collection[str]) -> bool:
    return path.parts[0] == DOMAIN_ENCODER or any(path.is_relative_to(one) for one in modules)


def _is_weights(name: str) -> bool:
    return _matches(name, WEIGHTS)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _weights_read(model: Path) -> set[str]:
    """Return the names of the weight files that are loaded; no warning names them."""
    if (model / SINGLE).is_file():
        return {SINGLE}
    if (model / INDEX).is_file():
        content = read_json(model / INDEX)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        return {INDEX, *(map(str, shards.values()) if isinstance(shards, dict) else ())}
    return {path.name for path in model.glob("*.bin*")}
