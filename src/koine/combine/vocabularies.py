"""Rows of embeddings when the models' vocabularies differ: a row belongs to its token, wherever each model keeps it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.alike import model_configuration, tokenizer_differences
from koine.combine.tensor_files import Checkpoint, Entry
from koine.errors import KoineWarning, UserError
from koine.files import read_json, write_json

TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    TOKENIZER, CONFIG, "special_tokens_map.json", TEMPLATE, "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json",
)  # fmt: skip
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PARTS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""Parts of the names of tensors with a row a token."""


@dataclass(frozen=True)
class Vocabularies:
    """Where each token of the result stands in each model.

    rows: of the result's embeddings. shared: `[n]`, the result's rows that all models have. places: `[n]` for each model, where they stand in it. alone: the
    other rows, each with the models that have it and where (the base is not among them, unless it alone has it).
    """

    rows: int
    shared: Tensor
    places: tuple[Tensor, ...]
    alone: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]


def is_vocabulary_tensor(name: str, entries: Sequence[Entry]) -> bool:
    """Whether a tensor has a row a token: by its name, and all else of its shape is equal in all models."""
    return any(part in name.split(".") for part in PARTS) and len({entry.shape[1:] for entry in entries}) == 1


def rows_of(checkpoint: Checkpoint) -> int | None:
    """Rows of a model's embeddings; of its configuration where no tensor is known to have a row a token."""
    for name, entry in checkpoint.items():
        if any(part in name.split(".") for part in PARTS):
            return entry.rows
    return _vocab_size(checkpoint.path)


def tokenizer_source(paths: Sequence[Path], *, with_base: bool, policy: str) -> Path:
    """The folder whose tokenizer and chat template the result has; see `align`."""
    return paths[_chosen(paths, with_base=with_base, policy=policy or "first")]


def _chosen(paths: Sequence[Path], *, with_base: bool, policy: str) -> int:
    if policy == "first":
        return 0
    if policy == "base":
        if not with_base:
            raise UserError("there is no base", where="--tokenizer", mend="give first, or a model's folder")
        return len(paths) - 1
    for index, path in enumerate(paths):
        if Path(policy).resolve() == path.resolve():
            return index
    raise UserError(
        f"'{policy}' is none of the models", where="--tokenizer", mend="give first, base, or a model"
    )


def align(
    paths: Sequence[Path], rows_of_each: Sequence[int | None], *, with_base: bool, policy: str
) -> Vocabularies | None:
    """How the rows of the models (the base's last) meet; None where all vocabularies are the same.

    rows_of_each: of the models' embeddings; a token whose id lies beyond them has no row in that model.
    policy: `first`, `base`, or the folder of one of the models: whose tokenizer the result has.

    Raises `UserError` where the tokenizers differ and no policy is given, or one of the models has no tokenizer.json.
    """
    chosen = _chosen(paths, with_base=with_base, policy=policy or "first")
    tokens = [tokens_of(path) for path in paths]
    if all(one == tokens[0] for one in tokens) and len(set(rows_of_each)) == 1:
        if not policy:
            _refuse_other_tokenizers(paths)
        return None
    if not policy:
        other = next(
            index
            for index in range(len(paths))
            if tokens[index] != tokens[0] or rows_of_each[index] != rows_of_each[0]
        )
        raise UserError(
            f"its vocabulary is another than that of {paths[0]}",
            where=paths[other],
            mend="say whose the result has: --tokenizer first, base, or a model's folder; rows are then merged token by token",
        )
    vocabularies: list[dict[str, int]] = []
    for path, known, rows in zip(paths, tokens, rows_of_each, strict=True):
        if known is None:
            raise UserError(
                "holds no tokenizer.json",
                where=path,
                mend="rows of different vocabularies are matched by their tokens",
            )
        vocabularies.append({token: row for token, row in known.items() if rows is None or row < rows})
    rows = rows_of_each[chosen] or len(vocabularies[chosen])
    strings = {row: token for token, row in vocabularies[chosen].items()}
    shared, places, alone = [], [list[int]() for _ in paths], []
    models = len(paths) - with_base
    for row in range(rows):
        token = strings.get(row)
        found = [None if token is None else known.get(token) for known in vocabularies]
        if all(place is not None for place in found):
            shared.append(row)
            for here, place in zip(places, found, strict=True):
                here.append(int(place))  # type: ignore[arg-type]
            continue
        holders = tuple((index, place) for index, place in enumerate(found[:models]) if place is not None)
        # A row that no token has (a vocabulary rounded up), or that only the base knows, comes from the chosen model.
        alone.append((row, holders or ((chosen, row),)))
    return Vocabularies(
        rows,
        torch.tensor(shared, dtype=torch.long),
        tuple(torch.tensor(here, dtype=torch.long) for here in places),
        tuple(alone),
    )


def _refuse_other_tokenizers(paths: Sequence[Path]) -> None:
    """Equal vocabularies may still cut text otherwise: by other merges, or after another normaliser."""
    if not (paths[0] / TOKENIZER).exists():
        return
    for path in paths[1:]:
        differing = tokenizer_differences(paths[0], path)
        if differing:
            raise UserError(
                f"its tokenizer is another than that of {paths[0]} (they differ in {', '.join(differing)})",
                where=path / TOKENIZER,
                mend="say whose the result has: --tokenizer first, base, or a model's folder",
            )


def warn_of_other_templates(models: Sequence[Path]) -> None:
    """Warn (`KoineWarning`) where chat templates differ: the result has the first model's."""
    templates = [_template(path) for path in models]
    other = next((path for path, one in zip(models, templates, strict=True) if one != templates[0]), None)
    if other is not None:
        warnings.warn(
            f"the chat template of {other} is another than that of {models[0]}, which is kept; --tokenizer MODEL says whose the result has",
            KoineWarning,
            stacklevel=2,
        )


def _template(path: Path) -> str | None:
    if (path / TEMPLATE).exists():
        return (path / TEMPLATE).read_text(encoding="utf-8")
    content = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    template = content.get("chat_template") if isinstance(content, dict) else None
    return None if template is None else str(template)


def write_tokenizer(source: Path, folder: Path, config: dict[str, Any], *, rows: int | None) -> None:
    """Put the tokenizer's files and chat template of `source` into `folder`, and what depends on them into `config` and into `generation_config.json`.

    rows: of the result's embeddings, where they are not the first model's.
    """
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    theirs = model_configuration(source)
    for part in ("", "text_config"):
        ours, other = (config.get(part), theirs.get(part)) if part else (config, theirs)
        if not isinstance(ours, dict) or not isinstance(other, dict):
            continue
        ours.update({key: other[key] for key in IDS if key in other})
        if rows is not None and "vocab_size" in ours:
            ours["vocab_size"] = rows
    generation = folder / GENERATION
    if generation.exists():
        settings = read_json(generation)
        own = read_json(source / GENERATION) if (source / GENERATION).exists() else theirs
        write_json(generation, {**settings, **{key: own[key] for key in IDS if key in own}})


def tokens_of(path: Path) -> dict[str, int] | None:
    """The id of every token of a folder's tokenizer.json; None where there is none."""
    file = path / TOKENIZER
    if not file.exists():
        return None
    content = read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        # Unigram models hold pairs of a token and its score.
        vocabulary = {str(pair[0]): index for index, pair in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        raise UserError("holds no vocabulary", where=file, mend="it is damaged or of an unknown kind")
    added = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or []}
    return {**vocabulary, **added}


def _vocab_size(path: Path) -> int | None:
    content = model_configuration(path)
    size = content.get("vocab_size") or (content.get("text_config") or {}).get("vocab_size")
    return int(size) if size else None
