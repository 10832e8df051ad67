"""Match the rows of embeddings by their tokens, where the models' vocabularies differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from koine.combine.merging.checks import check_same_shape
from koine.combine.merging.config import MergeConfig
from koine.combine.merging.tokenizers import check_same_tokenizers, read_token_ids
from koine.combine.merging.vocabulary_tensors import rows_first, vocabulary_tensors
from koine.errors import UserError
from koine.model.formats.safetensors_stream import Checkpoint


@dataclass(frozen=True)
class VocabularyAlignment:
    """The row of each token of the result in each model.

    Attributes:
        rows: Of the result's embeddings.
        shared: `[n]`, the result's rows that all models have.
        positions: `[n]` for each model, where these rows stand in it.
        partial: The other rows, each with the models that have it as pairs `(model, row)`. The base is not
            among them, unless it alone has the row.
    """

    rows: int
    shared: Tensor
    positions: tuple[Tensor, ...]
    partial: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def align_vocabularies(
    paths: Sequence[Path],
    tokens: Sequence[Mapping[str, int] | None],
    rows_of_each: Sequence[int],
    *,
    source: int,
    with_base: bool,
) -> VocabularyAlignment:
    """Align the rows of the models' embeddings.

    Args:
        paths: The models; the base last, where there is one.
        tokens: The id of every token in each model.
        rows_of_each: Rows of the tensor in each model. A token whose id lies beyond them has no row there.
        source: The model whose tokenizer the result has.
        with_base: Whether the last model is the base.

    Raises:
        UserError: One of the models has no tokenizer.json.
    """
    vocabularies: list[dict[str, int]] = []
    for path, known, count in zip(paths, tokens, rows_of_each, strict=True):
        if known is None:
            raise UserError(
                "holds no tokenizer.json",
                where=path,
                hint="rows of different vocabularies are matched by their tokens",
            )
        vocabularies.append({token: row for token, row in known.items() if row < count})
    rows = rows_of_each[source]
    strings = {row: token for token, row in vocabularies[source].items()}
    shared, positions, partial = [], [list[int]() for _ in paths], []
    models = len(paths) - with_base
    for row in range(rows):
        token = strings.get(row)
        found = [None if token is None else known.get(token) for known in vocabularies]
        held = [position for position in found if position is not None]
        if len(held) == len(found):
            shared.append(row)
            for here, position in zip(positions, held, strict=True):
                here.append(position)
            continue
        holders = tuple(
            (index, position) for index, position in enumerate(found[:models]) if position is not None
        )
        # A row without a token (a vocabulary rounded up), or known to the base alone, is the source's.
        partial.append((row, holders or ((source, row),)))
    return VocabularyAlignment(
        rows,
        torch.tensor(shared, dtype=torch.long),
        tuple(torch.tensor(here, dtype=torch.long) for here in positions),
        tuple(partial),
    )


def align_embeddings(
    config: MergeConfig, checkpoints: Sequence[Checkpoint], names: Sequence[str], source: int
) -> tuple[dict[str, VocabularyAlignment], dict[str, int]]:
    """Align each tensor that has one row per token, where the vocabularies differ.

    Args:
        config: The merge.
        checkpoints: The models, the base last.
        names: The tensors.
        source: The model whose tokenizer the result has.

    Returns:
        The alignment of each such tensor, and how many dimensions of length 1 stand before its rows. Both
        are empty where all models have one vocabulary.

    Raises:
        UserError: Vocabularies or tokenizers differ, and `config.tokenizer` is not given.
    """
    paths, tokens = [one.path for one in checkpoints], [read_token_ids(one.path) for one in checkpoints]
    differing = [name for name in names if len({one[name].shape for one in checkpoints}) > 1]
    if all(one == tokens[0] for one in tokens) and not differing:
        if not config.tokenizer:
            check_same_tokenizers(paths)
        return {}, {}
    axes = vocabulary_tensors(checkpoints[0])
    for name in differing:
        if name not in axes:
            check_same_shape(name, checkpoints)
    if not config.tokenizer:
        other = next(
            index
            for index, one in enumerate(checkpoints)
            if tokens[index] != tokens[0]
            or any(one[name].shape != checkpoints[0][name].shape for name in axes)
        )
        raise UserError(
            f"its vocabulary is another than that of {paths[0]}",
            where=paths[other],
            hint="say whose the result has: --tokenizer first, base, or a model's folder; "
            "rows are then merged token by token",
        )
    leading: dict[str, int] = {}
    by_lengths: dict[tuple[int, ...], VocabularyAlignment] = {}
    alignments: dict[str, VocabularyAlignment] = {}
    for name, axis in axes.items():
        for one in checkpoints:
            leading[name] = rows_first(one, name, axis)
        if len({one[name].shape[1:] for one in checkpoints}) > 1:
            check_same_shape(name, checkpoints)
        # Tables may differ in length: of tokens in each layer, or for text and more.
        lengths = tuple(one[name].rows for one in checkpoints)
        if lengths not in by_lengths:
            by_lengths[lengths] = align_vocabularies(
                paths, tokens, lengths, source=source, with_base=config.base is not None
            )
        alignments[name] = by_lengths[lengths]
    return alignments, leading
