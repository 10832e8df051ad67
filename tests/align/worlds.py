"""A tiny chat model with its tokenizer, and token shards of every kind of groups."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koine.data import Mixture
from koine.data.groups import GroupKind
from koine.model import save_model
from koine.tokenizer import load_tokenizer, train_tokenizer
from tests.data.conftest import document
from tests.data.groups import REVISION, group_tokens, labelled, mixture_of, pair, scored
from tests.train.models import small_config

MAKE: dict[str, Any] = {"preferences": pair, "labelled": labelled, "scored": scored}


@dataclass(frozen=True)
class AlignWorld:
    """Folders: of a model with its tokenizer, and of token shards by kind; `revised` has SRPO's groups."""

    root: Path
    model: Path
    tokens: dict[str, Path]

    def mixture(self, kind: str = "preferences", **options: Any) -> Mixture:
        return mixture_of(self.tokens[kind], **{"time": 128, **options})


def write_model(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write a model of random weights with the files of a tokenizer."""
    import torch

    from koine.model.decoder import Decoder

    torch.manual_seed(seed)
    save_model(Decoder(small_config(load_tokenizer(tokenizer).vocab_size)), folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def write_world(root: Path, kinds: tuple[str, ...] = ("preferences",), count: int = 24) -> AlignWorld:
    """Write a model, and `count` groups of each kind."""
    tokenizer = root / "tokenizer"
    tokenizer.mkdir(parents=True)
    texts = [document(number, 30) for number in range(200)]
    train_tokenizer({"en": lambda: texts}, vocab_size=350, english_share=None, min_frequency=2).save(
        tokenizer
    )
    tokens = {}
    for name in kinds:
        kind: GroupKind = "preferences" if name == "revised" else name  # type: ignore[assignment]
        options = {"revision": REVISION} if name == "revised" else {}
        records = [MAKE[kind](number) for number in range(count)]
        tokens[name] = group_tokens(root / name, tokenizer, records, kind, **options)
    return AlignWorld(root, write_model(root / "model", tokenizer), tokens)
