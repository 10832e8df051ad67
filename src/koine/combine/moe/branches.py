"""Open dense branches of one seed, and check that they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from koine.combine.compatibility import (
    MIN_RELATED_COSINE,
    field_difference,
    median_cosine,
    tokenizer_differences,
)
from koine.errors import UserError
from koine.model.config import ModelConfig
from koine.model.formats.checksum import verify_checksums
from koine.model.formats.config_json import read_config
from koine.model.formats.directory import open_canonical
from koine.model.formats.stored_tensors import CanonicalTensors
from koine.model.formats.weight_files import weight_files

NOT_SHAPES = ("mixture", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a configuration in which branches of one seed may differ."""


@dataclass(frozen=True)
class Branch:
    """A dense model: its name, its folder, and its tensors by our stored names, which are read on access."""

    name: str
    path: Path
    config: ModelConfig
    weights: CanonicalTensors

    def tensor(self, name: str) -> torch.Tensor:
        """Return a stored tensor. Raises `UserError` if it holds NaN or infinity."""
        tensor = self.weights[name]
        # A sum is one pass, and is finite where all entries are, but for an overflow.
        if not math.isfinite(float(tensor.sum())) and not torch.isfinite(tensor).all():
            raise UserError(
                f"{name} holds NaN or infinity", where=self.path, hint="this checkpoint is broken"
            )
        return tensor


def open_branch(path: Path, name: str) -> Branch:
    """Open a dense model of our decoder. Raises `UserError` if it is none, or is a mixture."""
    path = Path(path)
    config = read_config(path)
    if config.mixture is not None:
        raise UserError("is a mixture of experts already", where=path, hint="give dense models")
    return Branch(name, path, config, open_canonical(path, config))


def open_branches(seed: Path, experts: Mapping[str, Path]) -> tuple[Branch, list[Branch]]:
    """Open the seed and its branches, given by name.

    Raises `UserError` if a branch has other shapes, another tokenizer or another ancestor than the seed.
    """
    verify_checksums([file for path in (seed, *experts.values()) for file in _weights_of(Path(path))])
    root = open_branch(seed, "seed")
    opened = [open_branch(path, name) for name, path in experts.items()]
    for branch in opened:
        check_other_shapes(root.config, branch.config, branch.path, than=root.path)
        check_other_tokenizer(root.path, branch.path)
        check_other_ancestor(root, branch)
    return root, opened


def _weights_of(path: Path) -> list[Path]:
    """Return the weight files of a model; none where there is no model, which opening it reports."""
    try:
        return weight_files(path)
    except UserError:
        return []


def check_other_shapes(wanted: ModelConfig, found: ModelConfig, path: Path, *, than: Path) -> None:
    """Raise `UserError` with the first field in which two configurations differ.

    Experts are left out, and ids of special tokens: a mixture has those of the seed. Two classes fit where they
    compute the same.
    """
    difference = field_difference(wanted, found, ignoring=NOT_SHAPES)
    if difference is not None:
        name, ours, theirs = difference
        if wanted.model_type != found.model_type:
            raise UserError(
                f"is a {found.model_type or 'koine'} model, and {than} a {wanted.model_type or 'koine'} model "
                f"({name} is {theirs}, and {ours} there)",
                where=path / "config.json",
                hint="experts are branches of one seed: give models of one family",
            )
        raise UserError(
            f"{name} is {theirs}, and {ours} in {than}",
            where=path / "config.json",
            hint="experts are branches of one seed: give models of equal shape",
        )


def check_other_tokenizer(wanted: Path, found: Path) -> None:
    """Raise `UserError` if the tokenizers of two models split text or number tokens differently."""
    for path in (wanted, found):
        if not (path / "tokenizer.json").exists():
            raise UserError(
                "holds no tokenizer.json", where=path, hint="it is needed to check that the models fit"
            )
    differing = tokenizer_differences(wanted, found)
    if differing:
        raise UserError(
            f"its tokenizer is another than that of {wanted} (they differ in {', '.join(differing)})",
            where=found / "tokenizer.json",
            hint="experts are branches of one seed, with one vocabulary",
        )


def check_other_ancestor(seed: Branch, branch: Branch) -> None:
    """Raise `UserError` if the matrices of two models are unrelated.

    See `koine.combine.compatibility.MIN_RELATED_COSINE`.
    """
    middle = f"model.layers.{len(seed.config.layers) // 2}."
    names = [f"{middle}{part}.weight" for part in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]
    found = median_cosine([(seed.tensor(name), branch.tensor(name)) for name in names])
    if found is not None and found < MIN_RELATED_COSINE:
        raise UserError(
            f"has no common ancestor with {seed.path} (the cosine of their matrices is {found:.2f})",
            where=branch.path,
            hint="give branches of one seed: models that were trained on from it",
        )


def check_no_model(out: Path) -> None:
    """Raise `UserError` if a folder to write to holds a model: it would be overwritten file by file."""
    if (Path(out) / "config.json").exists():
        raise UserError("holds a model already", where=out, hint="choose another folder, or remove it")
