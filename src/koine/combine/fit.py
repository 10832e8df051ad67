"""The models of a merge, opened and checked to fit together, and the layout of the result."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.combine.alike import ALIKE, likeness, model_configuration, refuse_other_function
from koine.combine.methods import MethodInfo
from koine.combine.recipe import Recipe, check_recipe
from koine.combine.tensor_files import Checkpoint
from koine.combine.vocabularies import (
    Vocabularies,
    align,
    is_vocabulary_tensor,
    rows_of,
    tokenizer_source,
    warn_of_other_templates,
)
from koine.errors import UserError
from koine.model.mixture_files import DOMAIN_ENCODER

PROBED = 7
"""Tensors by which a common ancestor is looked for."""

PROBED_ENTRIES = 262_144
"""Entries of each that are read."""

LEAST_PROBED = 1_024
"""Entries in all below which chance alone makes models look alike or not: nothing is concluded then."""


@dataclass
class Plan:
    """The opened models, and the layout of the result. tokenizer: the folder that its tokenizer and chat template come from."""

    recipe: Recipe
    info: MethodInfo
    models: list[Checkpoint]
    base: Checkpoint | None
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    vocabularies: Vocabularies | None
    tokenizer: Path

    def everyone(self) -> list[Checkpoint]:
        """The models, and the base last where there is one."""
        return self.models if self.base is None else [*self.models, self.base]

    def weights_of(self, name: str) -> tuple[float, ...]:
        """The models' weights for a tensor."""
        for pattern, weights in self.recipe.weights_for:
            if fnmatch.fnmatchcase(name, pattern):
                return weights
        return self.recipe.weights

    def by_token(self, name: str) -> bool:
        """Whether a tensor's rows meet by their tokens."""
        return self.vocabularies is not None and is_vocabulary_tensor(
            name, [one[name] for one in self.everyone()]
        )

    def close(self) -> None:
        """Close the files."""
        for checkpoint in self.everyone():
            checkpoint.close()


def plan_merge(recipe: Recipe) -> Plan:
    """Open and check everything. Raises `UserError` where the models do not fit together or the recipe does not fit the method.

    Warns (`KoineWarning`) where the models' chat templates differ and the recipe does not say whose is kept.
    """
    check_recipe(recipe)
    models = [Checkpoint(path) for path in recipe.models]
    base = None if recipe.base is None else Checkpoint(recipe.base)
    everyone = models if base is None else [*models, base]
    try:
        return _checked(recipe, models, base, everyone)
    except UserError:
        for one in everyone:
            one.close()
        raise


def _checked(
    recipe: Recipe, models: list[Checkpoint], base: Checkpoint | None, everyone: list[Checkpoint]
) -> Plan:
    first, paths = models[0], [one.path for one in everyone]
    for one in everyone[1:]:
        refuse_other_function(first.path, one.path)
        _refuse_other_encoder(first.path, one.path)
    names = _names(everyone)
    vocabularies = align(
        paths, [rows_of(one) for one in everyone], with_base=base is not None, policy=recipe.tokenizer
    )
    source = tokenizer_source(paths, with_base=base is not None, policy=recipe.tokenizer)
    if not recipe.tokenizer:
        warn_of_other_templates([one.path for one in models])
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
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
    if not recipe.unrelated:
        # Each is compared with the ancestor, where it is given.
        root = base or first
        for one in everyone:
            if one is not root:
                _refuse_other_ancestor(root, one, names)
    return Plan(recipe, recipe.method_info(), models, base, layout, vocabularies, source)


def _names(everyone: Sequence[Checkpoint]) -> list[str]:
    """The tensors that all models have; raises `UserError` where one lacks some or has more."""
    first = everyone[0]
    tied = {"lm_head.weight"} if _tied(first.path) else set()

    def counts(name: str) -> bool:
        return name not in tied and not name.endswith("rotary_emb.inv_freq")

    names = [name for name in first if counts(name)]
    for one in everyone[1:]:
        missing = [name for name in names if name not in one]
        extra = [name for name in one if name not in first and counts(name)]
        if missing or extra:
            raise UserError(
                f"lacks {missing[0]}" if missing else f"has {extra[0]}, which {first.path} lacks",
                where=one.path,
                mend="models of one architecture and size can be merged",
            )
    return names


def _tied(path: Path) -> bool:
    content = model_configuration(path)
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
            mend="mixtures of one upcycling can be merged",
        )


def _refuse_other_ancestor(root: Checkpoint, other: Checkpoint, names: Sequence[str]) -> None:
    """Raise `UserError` where the matrices of two models have nothing in common (see `koine.combine.alike.ALIKE`)."""
    matrices = [
        name
        for name in names
        if root[name].dtype.is_floating_point
        and len(root[name].shape) > 1
        and root[name].shape == other[name].shape
        and not is_vocabulary_tensor(name, [root[name], other[name]])
    ]
    step = max(1, len(matrices) // PROBED)
    # Not the first and not the last: from the middle of each stretch.
    probed = matrices[step // 2 :: step][:PROBED]
    pairs = [(_beginning(root, name), _beginning(other, name)) for name in probed]
    if sum(first.numel() for first, _ in pairs) < LEAST_PROBED:
        return
    found = likeness(pairs)
    if found is not None and found < ALIKE:
        raise UserError(
            f"has no common ancestor with {root.path} (the cosine of their matrices is {found:.2f})",
            where=other.path,
            mend="weights of independent models have no common order; to merge them all the same, add --unrelated",
        )


def _beginning(checkpoint: Checkpoint, name: str) -> Tensor:
    entry = checkpoint[name]
    return checkpoint.read(name, 0, min(entry.rows, max(1, PROBED_ENTRIES // max(1, entry.row))))
