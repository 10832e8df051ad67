"""The plan of a merge: the models, checked to fit together, and a job for each tensor of the result."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from koine.combine.compatibility import check_same_function
from koine.combine.merging.checks import (
    check_common_ancestor,
    check_same_encoder,
    check_same_kind,
    check_same_shape,
)
from koine.combine.merging.config import MergeConfig, check_config
from koine.combine.merging.methods import MergeMethod
from koine.combine.merging.sentence_modules import module_configs
from koine.combine.merging.tensor_job import TensorJob
from koine.combine.merging.tensor_names import match_names
from koine.combine.merging.tokenizers import tokenizer_source, warn_if_templates_differ
from koine.combine.merging.vocabulary_alignment import VocabularyAlignment, align_embeddings
from koine.errors import UserError
from koine.model.formats.safetensors_stream import Checkpoint


@dataclass
class MergePlan:
    """The opened models, and a job for each tensor of the result.

    Attributes:
        config: What was asked for.
        models, base: The opened checkpoints.
        jobs: The merge of each tensor, by its name, in the order of the first model.
        tokenizer: The folder from which the result gets its tokenizer and chat template.
        modules: Plans of the sub-folders of a sentence model that hold weights of their own.
    """

    config: MergeConfig
    models: list[Checkpoint]
    base: Checkpoint | None
    jobs: dict[str, TensorJob]
    tokenizer: Path
    modules: dict[str, MergePlan]

    @property
    def method(self) -> MergeMethod:
        """Return the merge method."""
        return self.config.merge_method()

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Return the models, and the base last where there is one."""
        return self.models if self.base is None else [*self.models, self.base]

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of the result."""
        return {name: (job.dtype, job.shape) for name, job in self.jobs.items()}

    @property
    def vocabularies_differ(self) -> bool:
        """Return whether rows are matched by their tokens in some tensor."""
        return any(job.alignment is not None for job in self.jobs.values())

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()
        for plan in self.modules.values():
            plan.close()


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open the models, check that they fit together, and plan the merge of each tensor.

    Warns (`KoineWarning`) where the models' chat templates differ and `config.tokenizer` is not given.

    Raises:
        UserError: The models do not fit together, or the configuration does not fit the method.
    """
    check_config(config)
    models = [Checkpoint(path) for path in config.models]
    base = None if config.base is None else Checkpoint(config.base)
    checkpoints = models if base is None else [*models, base]
    try:
        return _checked_plan(config, models, base, checkpoints)
    except UserError:
        for checkpoint in checkpoints:
            checkpoint.close()
        raise


def _checked_plan(
    config: MergeConfig, models: list[Checkpoint], base: Checkpoint | None, checkpoints: list[Checkpoint]
) -> MergePlan:
    first, paths = models[0], [one.path for one in checkpoints]
    for path in paths[1:]:
        check_same_function(first.path, path)
        check_same_encoder(first.path, path)
    names = match_names(checkpoints)
    for name in names:
        check_same_kind(name, checkpoints)
    source = tokenizer_source(paths, with_base=base is not None, policy=config.tokenizer)
    alignments, leading = align_embeddings(config, checkpoints, names, source)
    if not config.tokenizer:
        warn_if_templates_differ([one.path for one in models])
    for name in names:
        if name not in alignments:
            check_same_shape(name, checkpoints)
    _check_patterns(config, names)
    if not config.unrelated:
        # Each model is compared with the base, where it is given.
        root = base or first
        for checkpoint in checkpoints:
            if checkpoint is not root:
                check_common_ancestor(root, checkpoint, names)
    jobs = {
        name: _tensor_job(config, checkpoints, name, alignments.get(name), leading.get(name, 0))
        for name in names
    }
    return MergePlan(config, models, base, jobs, paths[source], _plan_modules(config))


def _tensor_job(
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    name: str,
    alignment: VocabularyAlignment | None,
    leading: int,
) -> TensorJob:
    """Return the job of one tensor.

    Args:
        config: The merge.
        checkpoints: The models, the base last.
        name: The tensor.
        alignment: How its rows are matched by token; None where they match by position.
        leading: How many dimensions of length 1 stand before the rows.
    """
    entries = tuple(one[name] for one in checkpoints)
    shape, dtype = entries[0].shape, entries[0].dtype
    if alignment is not None:
        shape = ((1,) * leading) + (alignment.rows, *shape[1:])
    if config.dtype is not None and dtype.is_floating_point:
        dtype = getattr(torch, config.dtype)
    stored = [entry.dtype for entry in entries]
    return TensorJob(
        name=name,
        checkpoints=tuple(checkpoints),
        entries=entries,
        has_base=config.base is not None,
        method=config.merge_method(),
        options=config.options,
        weights=config.weights_of(name),
        seed=config.seed,
        read_dtypes=tuple(one if config.dtype is None else torch.promote_types(one, dtype) for one in stored),
        dtype=dtype,
        shape=shape,
        alignment=alignment,
    )


def _plan_modules(config: MergeConfig) -> dict[str, MergePlan]:
    """Plan the merges of a sentence model's sub-folders."""
    modules: dict[str, MergePlan] = {}
    try:
        for folder, inner in module_configs(config).items():
            modules[folder] = plan_merge(inner)
    except UserError:
        for plan in modules.values():
            plan.close()
        raise
    return modules


def _check_patterns(config: MergeConfig, names: Sequence[str]) -> None:
    """Raise `UserError` where a pattern of `weights_for` names no tensor."""
    for pattern, _ in config.weights_for:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"no tensor is named '{pattern}'",
                where="--weights-for",
                hint=f"names are like {names[len(names) // 2]}",
            )
