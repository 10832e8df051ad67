"""The models of a merge, opened and checked to fit together, and the layout of the result."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.combine.compatibility import (
    MIN_RELATED_COSINE,
    check_same_function,
    median_cosine,
    model_configuration,
)
from koine.combine.merging.config import MergeConfig, check_config
from koine.combine.merging.methods import MergeMethod
from koine.combine.merging.sentence_modules import module_configs
from koine.combine.merging.tensor_names import match_names
from koine.combine.merging.vocabularies import (
    VocabularyAlignment,
    align_vocabularies,
    check_same_tokenizers,
    read_token_ids,
    tokenizer_source,
    warn_if_templates_differ,
)
from koine.combine.merging.vocabulary_tensors import rows_first, vocabulary_sizes, vocabulary_tensors
from koine.combine.safetensors_stream import Checkpoint
from koine.errors import UserError
from koine.model.formats.mixture_files import DOMAIN_ENCODER

PROBED = 7
"""Tensors by which a common ancestor is looked for."""

PROBED_ENTRIES = 262_144
"""Entries of each that are read."""

LEAST_PROBED = 1_024
"""Entries in all below which chance alone makes models look alike or not: nothing is concluded then."""


@dataclass
class MergePlan:
    """The opened models, and the layout of the result.

    vocabularies: for each tensor whose rows meet by their tokens, how; empty where all models have one
    vocabulary.
    tokenizer: the folder that the result's tokenizer and chat template come from.
    modules: plans of the sub-folders of a sentence model that hold weights of their own.
    """

    config: MergeConfig
    info: MergeMethod
    models: list[Checkpoint]
    base: Checkpoint | None
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    vocabularies: dict[str, VocabularyAlignment]
    tokenizer: Path
    modules: dict[str, MergePlan]

    def inputs(self) -> list[Checkpoint]:
        """The models, and the base last where there is one."""
        return self.models if self.base is None else [*self.models, self.base]

    def weights_of(self, name: str) -> tuple[float, ...]:
        """The models' weights for a tensor."""
        for pattern, weights in self.config.weights_for:
            if fnmatch.fnmatchcase(name, pattern):
                return weights
        return self.config.weights

    def dtype_read(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype that a method is given a tensor in.

        A result of a wider or another dtype must not be rounded to the models' first.
        """
        return stored if self.config.dtype is None else torch.promote_types(stored, self.layout[name][0])

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.inputs():
            checkpoint.close()
        for plan in self.modules.values():
            plan.close()


def plan_merge(config: MergeConfig) -> MergePlan:
    """Open and check everything. Raises `UserError` where the models do not fit together or the configuration does not fit the method.

    Warns (`KoineWarning`) where the models' chat templates differ and the configuration does not say whose is kept.
    """
    check_config(config)
    models = [Checkpoint(path) for path in config.models]
    base = None if config.base is None else Checkpoint(config.base)
    inputs = models if base is None else [*models, base]
    try:
        return _checked(config, models, base, inputs)
    except UserError:
        for one in inputs:
            one.close()
        raise


def _checked(
    config: MergeConfig, models: list[Checkpoint], base: Checkpoint | None, inputs: list[Checkpoint]
) -> MergePlan:
    first, paths = models[0], [one.path for one in inputs]
    for one in inputs[1:]:
        check_same_function(first.path, one.path)
        _refuse_other_encoder(first.path, one.path)
    names = match_names(inputs)
    for name in names:
        _same_kind(name, inputs)
    chosen = tokenizer_source(paths, with_base=base is not None, policy=config.tokenizer)
    vocabularies, leading = _meet(config, inputs, names, chosen)
    if not config.tokenizer:
        warn_if_templates_differ([one.path for one in models])
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        shape, dtype = first[name].shape, first[name].dtype
        if name in vocabularies:
            shape = ((1,) * leading[name]) + (vocabularies[name].rows, *shape[1:])
        else:
            _same_shape(name, inputs)
        if config.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, config.dtype)
        layout[name] = (dtype, shape)
    for pattern, _ in config.weights_for:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"no tensor is named '{pattern}'",
                where="--weights-for",
                hint=f"names are like {names[len(names) // 2]}",
            )
    if not config.unrelated:
        # Each is compared with the ancestor, where it is given.
        root = base or first
        for one in inputs:
            if one is not root:
                _refuse_other_ancestor(root, one, names)
    modules: dict[str, MergePlan] = {}
    try:
        for folder, inner in module_configs(config).items():
            modules[folder] = plan_merge(inner)
    except UserError:
        for plan in modules.values():
            plan.close()
        raise
    return MergePlan(
        config, config.method_info(), models, base, layout, vocabularies, paths[chosen], modules
    )  # fmt: skip


def _meet(
    config: MergeConfig, inputs: Sequence[Checkpoint], names: Sequence[str], chosen: int
) -> tuple[dict[str, VocabularyAlignment], dict[str, int]]:
    """Align the rows of each tensor that has one row per token; empty for one vocabulary.

    Also gives how many dimensions of length 1 stand before the rows.

    Raises `UserError` where the vocabularies or the tokenizers differ and the configuration does not say whose the
    result has.
    """
    paths, tokens = [one.path for one in inputs], [read_token_ids(one.path) for one in inputs]
    differing = [name for name in names if len({one[name].shape for one in inputs}) > 1]
    if all(one == tokens[0] for one in tokens) and not differing:
        if not config.tokenizer:
            check_same_tokenizers(paths)
        return {}, {}
    found = vocabulary_tensors(inputs[0])
    for name in differing:
        if name not in found:
            _same_shape(name, inputs)
    if not config.tokenizer:
        other = next(
            index
            for index, one in enumerate(inputs)
            if tokens[index] != tokens[0] or any(one[name].shape != inputs[0][name].shape for name in found)
        )
        raise UserError(
            f"its vocabulary is another than that of {paths[0]}",
            where=paths[other],
            hint="say whose the result has: --tokenizer first, base, or a model's folder; rows are then merged token by token",
        )
    leading: dict[str, int] = {}
    by_rows: dict[tuple[int, ...], VocabularyAlignment] = {}
    vocabularies: dict[str, VocabularyAlignment] = {}
    for name, axis in found.items():
        for one in inputs:
            leading[name] = rows_first(one, name, axis)
        if len({one[name].shape[1:] for one in inputs}) > 1:
            _same_shape(name, inputs)
        # Several tables may have lengths of their own: of tokens in each layer, or for text and more.
        lengths = tuple(one[name].rows for one in inputs)
        if lengths not in by_rows:
            by_rows[lengths] = align_vocabularies(
                paths, tokens, lengths, chosen=chosen, with_base=config.base is not None
            )
        vocabularies[name] = by_rows[lengths]
    return vocabularies, leading


def _same_shape(name: str, inputs: Sequence[Checkpoint]) -> None:
    for one in inputs[1:]:
        if one[name].shape != inputs[0][name].shape:
            raise UserError(
                f"{name} has shape {list(one[name].shape)}, and {list(inputs[0][name].shape)} in {inputs[0].path}",
                where=one.path,
                hint="models of one size can be merged",
            )


def _same_kind(name: str, inputs: Sequence[Checkpoint]) -> None:
    for one in inputs[1:]:
        dtypes = (inputs[0][name].dtype, one[name].dtype)
        if dtypes[0] != dtypes[1] and not all(dtype.is_floating_point for dtype in dtypes):
            raise UserError(
                f"{name} is {dtypes[1]}, and {dtypes[0]} in {inputs[0].path}".replace("torch.", ""),
                where=one.path,
                hint="integers are copied where they are equal, and not merged",
            )


def _refuse_other_encoder(wanted: Path, found: Path) -> None:
    """Domain embeddings of two encoders are points of two spaces: an average of them means nothing."""
    contents = [
        {file.name: file.read_bytes() for file in sorted((path / DOMAIN_ENCODER).glob("*"))}
        for path in (wanted, found)
    ]
    if all(contents) and contents[0] != contents[1]:
        raise UserError(
            f"its domains were embedded by another encoder than those of {wanted}",
            where=found / DOMAIN_ENCODER,
            hint="mixtures of one upcycling can be merged",
        )


def _refuse_other_ancestor(root: Checkpoint, other: Checkpoint, names: Sequence[str]) -> None:
    """Raise `UserError` where the matrices of two models have nothing in common (see `koine.combine.compatibility.MIN_RELATED_COSINE`)."""
    # Tables of tokens are left out: they may be of other vocabularies.
    tables = vocabulary_sizes(model_configuration(root.path))
    matrices = [
        name
        for name in names
        if root[name].dtype.is_floating_point
        and len(root[name].shape) > 1
        and root[name].shape == other[name].shape
        and root[name].rows not in tables
    ]
    step = max(1, len(matrices) // PROBED)
    # Not the first and not the last: from the middle of each stretch.
    probed = matrices[step // 2 :: step][:PROBED]
    pairs = [(_beginning(root, name), _beginning(other, name)) for name in probed]
    if sum(first.numel() for first, _ in pairs) < LEAST_PROBED:
        return
    found = median_cosine(pairs)
    if found is not None and found < MIN_RELATED_COSINE:
        raise UserError(
            f"has no common ancestor with {root.path} (the cosine of their matrices is {found:.2f})",
            where=other.path,
            hint="weights of independent models have no common order; to merge them all the same, add --unrelated",
        )


def _beginning(checkpoint: Checkpoint, name: str) -> Tensor:
    entry = checkpoint[name]
    return checkpoint.read(name, 0, min(entry.rows, max(1, PROBED_ENTRIES // max(1, entry.row))))
