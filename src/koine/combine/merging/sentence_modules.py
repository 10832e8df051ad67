"""Sub-folders of a sentence model (`1_Pooling`, `2_Dense`): those with weights are merged as the model is."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from koine.combine.compatibility import model_configuration
from koine.combine.merging.config import MergeConfig
from koine.errors import KoineWarning, UserError
from koine.model.formats.carried_files import module_folders, module_weights
from koine.model.formats.safetensors_stream import Checkpoint


def module_configs(config: MergeConfig) -> dict[str, MergeConfig]:
    """Return the configuration that merges each module folder whose weights differ; empty for other models.

    Where a model has no such folder (a base without a head, for example), the first model's stays, and a
    `KoineWarning` says so if it holds weights.

    Raises:
        UserError: The models' modules differ, or weights that differ are not safetensors.
    """
    first, *others = config.models
    inputs = [*config.models, *([] if config.base is None else [config.base])]
    for other in others:
        _check_same_modules(first, other)
    found: dict[str, MergeConfig] = {}
    for name, files in module_weights(first).items():
        folders = [path / name for path in inputs]
        lacking = [folder for folder in folders if not any((folder / file).is_file() for file in files)]
        if lacking:
            warnings.warn(
                f"the weights of {name} are those of {first}: {lacking[0]} has none",
                KoineWarning,
                stacklevel=2,
            )
        elif not _all_equal(folders, files):
            if not all((folder / "model.safetensors").is_file() for folder in folders):
                raise UserError(
                    f"is another than that of {first}, and no safetensors file",
                    where=folders[1] / files[0],
                    hint="save the models again with a newer version of sentence-transformers",
                )
            found[name] = _module_config(config, name)
    return found


def _module_config(config: MergeConfig, name: str) -> MergeConfig:
    """Return the configuration that merges one module folder; patterns that name none of its tensors go."""
    models = tuple(path / name for path in config.models)
    checkpoint = Checkpoint(models[0])
    names = list(checkpoint)
    checkpoint.close()
    return replace(
        config,
        models=models,
        base=None if config.base is None else config.base / name,
        weights_for=tuple(
            pair for pair in config.weights_for if any(fnmatch.fnmatchcase(one, pair[0]) for one in names)
        ),
        tokenizer="",
        unrelated=True,
    )


def _all_equal(folders: Sequence[Path], files: Sequence[str]) -> bool:
    return all(
        (folder / file).is_file() and (folder / file).read_bytes() == (folders[0] / file).read_bytes()
        for file in files
        for folder in folders[1:]
    )


def _check_same_modules(first: Path, other: Path) -> None:
    """Raise `UserError` where two sentence models' modules differ. Other models pass."""
    ours, theirs = module_folders(first), module_folders(other)
    if not ours or not theirs:
        return
    if ours != theirs:
        raise UserError(
            f"has the modules {', '.join(theirs)}, and {first} {', '.join(ours)}",
            where=other / "modules.json",
            hint="sentence models of the same modules can be merged",
        )
    for name in ours:
        one, two = (model_configuration(path / name) for path in (first, other))
        for field in one.keys() & two.keys():
            if one[field] != two[field] and not field.startswith("_"):
                raise UserError(
                    f"{field} is {two[field]}, and {one[field]} in {first}",
                    where=other / name / "config.json",
                    hint="sentence models of the same modules can be merged",
                )
