"""Whether the tensors of a merge's models fit together: shapes, dtypes, encoders, a common ancestor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from koine.combine.compatibility import MIN_RELATED_COSINE, median_cosine, model_configuration
from koine.combine.merging.vocabulary_tensors import vocabulary_sizes
from koine.errors import UserError
from koine.model.formats.mixture_files import DOMAIN_ENCODER
from koine.model.formats.safetensors_stream import Checkpoint

PROBED_TENSORS = 7
"""Tensors that are compared to find a common ancestor."""

PROBED_ENTRIES = 262_144
"""Entries of each that are read."""

MIN_PROBED_ENTRIES = 1_024
"""With fewer entries in all the cosine depends on chance, and nothing is concluded."""


def check_same_shape(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `UserError` where a tensor has another shape in one of the models."""
    first = checkpoints[0]
    for one in checkpoints[1:]:
        if one[name].shape != first[name].shape:
            raise UserError(
                f"{name} has shape {list(one[name].shape)}, and {list(first[name].shape)} in {first.path}",
                where=one.path,
                hint="models of one size can be merged",
            )


def check_same_kind(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `UserError` where a tensor's dtypes differ and not all are floating-point."""
    for one in checkpoints[1:]:
        dtypes = (checkpoints[0][name].dtype, one[name].dtype)
        if dtypes[0] != dtypes[1] and not all(dtype.is_floating_point for dtype in dtypes):
            raise UserError(
                f"{name} is {dtypes[1]}, and {dtypes[0]} in {checkpoints[0].path}".replace("torch.", ""),
                where=one.path,
                hint="integers are copied where they are equal, and not merged",
            )


def check_same_encoder(wanted: Path, found: Path) -> None:
    """Raise `UserError` where two mixtures' domains were embedded by different encoders.

    Their embeddings are points of two spaces, and an average of them means nothing.
    """
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


def check_common_ancestor(root: Checkpoint, other: Checkpoint, names: Sequence[str]) -> None:
    """Raise `UserError` where the matrices of two models show no common ancestor.

    See `koine.combine.compatibility.MIN_RELATED_COSINE`.
    """
    # Embeddings are left out: they may be of other vocabularies.
    vocabulary_lengths = vocabulary_sizes(model_configuration(root.path))
    matrices = [
        name
        for name in names
        if root[name].dtype.is_floating_point
        and len(root[name].shape) > 1
        and root[name].shape == other[name].shape
        and root[name].rows not in vocabulary_lengths
    ]
    step = max(1, len(matrices) // PROBED_TENSORS)
    # From the middle of each stretch: neither the first matrix nor the last.
    probed = matrices[step // 2 :: step][:PROBED_TENSORS]
    pairs = [(_first_rows(root, name), _first_rows(other, name)) for name in probed]
    if sum(first.numel() for first, _ in pairs) < MIN_PROBED_ENTRIES:
        return
    found = median_cosine(pairs)
    if found is not None and found < MIN_RELATED_COSINE:
        raise UserError(
            f"has no common ancestor with {root.path} (the cosine of their matrices is {found:.2f})",
            where=other.path,
            hint="weights of independent models have no common order; "
            "to merge them all the same, add --unrelated",
        )


def _first_rows(checkpoint: Checkpoint, name: str) -> Tensor:
    """Read the first rows of a tensor, about `PROBED_ENTRIES` entries."""
    entry = checkpoint[name]
    return checkpoint.read(name, 0, min(entry.rows, max(1, PROBED_ENTRIES // max(1, entry.row))))
