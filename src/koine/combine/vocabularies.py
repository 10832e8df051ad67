"""Rows of embeddings when the models' vocabularies differ: a row belongs to its token, wherever each model keeps it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from koine.combine.tensor_files import Entry
from koine.errors import UserError
from koine.files import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json",
)  # fmt: skip
PARTS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
"""Parts of the names of tensors with a row a token."""


@dataclass(frozen=True)
class Vocabularies:
    """Where each token of the result stands in each model.

    rows: of the result's embeddings. shared: `[n]`, the result's rows that all models have. places: `[n]` for each model, where they stand in it. alone: the
    other rows, each with the models that have it and where (the base is not among them, unless it alone has it). source: the folder whose tokenizer the result has.
    """

    rows: int
    shared: Tensor
    places: tuple[Tensor, ...]
    alone: tuple[tuple[int, tuple[tuple[int, int], ...]], ...]
    source: Path

    def write(self, folder: Path, config: dict[str, Any]) -> None:
        """Put the tokenizer's files into `folder`, and what depends on it into `config`."""
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
            if (self.source / name).exists():
                shutil.copyfile(self.source / name, folder / name)
        theirs = read_json(self.source / "config.json")
        for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            if key in theirs:
                config[key] = theirs[key]


def is_vocabulary_tensor(name: str, entries: Sequence[Entry]) -> bool:
    """Whether a tensor has a row a token: by its name, and all else of its shape is equal in all models."""
    return any(part in name.split(".") for part in PARTS) and len({entry.shape[1:] for entry in entries}) == 1


def align(paths: Sequence[Path], *, with_base: bool, policy: str) -> Vocabularies | None:
    """How the rows of the models (the base's last) meet; None where all vocabularies are the same.

    policy: `first`, `base`, or the folder of one of the models: whose tokenizer the result has.

    Raises `UserError` where the vocabularies differ and no policy is given, or one of the models has no tokenizer.json.
    """
    tokens = [_tokens(path) for path in paths]
    sizes = [_vocab_size(path) for path in paths]
    if all(one == tokens[0] for one in tokens) and len(set(sizes)) == 1:
        if policy not in ("", "first", "base", *map(str, paths)):
            raise UserError(
                f"'{policy}' is none of the models", where="--tokenizer", mend="give first, base, or a model"
            )
        return None
    if not policy:
        other = next(i for i in range(len(paths)) if tokens[i] != tokens[0] or sizes[i] != sizes[0])
        raise UserError(
            f"its vocabulary is another than that of {paths[0]}",
            where=paths[other],
            mend="say whose the result has: --tokenizer first, base, or a model's folder; rows are then merged token by token",
        )
    if policy == "base" and not with_base:
        raise UserError("there is no base", where="--tokenizer", mend="give first, or a model's folder")
    named = {"first": 0, "base": len(paths) - 1} | {str(path): index for index, path in enumerate(paths)}
    if policy not in named:
        raise UserError(
            f"'{policy}' is none of the models", where="--tokenizer", mend="give first, base, or a model"
        )
    chosen = named[policy]
    vocabularies: list[dict[str, int]] = []
    for path, known in zip(paths, tokens, strict=True):
        if known is None:
            raise UserError(
                "holds no tokenizer.json",
                where=path,
                mend="rows of different vocabularies are matched by their tokens",
            )
        vocabularies.append(known)
    rows = sizes[chosen] or len(vocabularies[chosen])
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
        paths[chosen],
    )


def _tokens(path: Path) -> dict[str, int] | None:
    file = path / "tokenizer.json"
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
    file = path / "config.json"
    content = read_json(file) if file.exists() else {}
    size = content.get("vocab_size") or (content.get("text_config") or {}).get("vocab_size")
    return int(size) if size else None
