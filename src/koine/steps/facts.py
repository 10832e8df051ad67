"""What is known of artifacts before they are built: the `facts` that the checks of steps hand on.

Each function here returns the facts of a `PlannedInput`: read from disk where it is there, else those that
the check of the step that will write it returned. None: nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from koine.errors import UserError
from koine.files import read_json, read_json_object
from koine.model.config import ModelConfig
from koine.plan import PlannedInput
from koine.steps.corpus_files import load_roles


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """A corpus. None: only the run will know."""

    primary: tuple[str, ...] | None = None
    expanded: tuple[str, ...] | None = None
    chat: tuple[str, ...] | None = None
    heldout_documents: int | None = None
    """Held-out documents of each language."""
    part_bytes: Mapping[str, int]
    """Bytes of each part: `documents`, `dialogues`, `questions/train`, `code.jsonl`."""
    document_bytes: int = 600
    """Bytes of text of a document."""

    @property
    def languages(self) -> tuple[str, ...] | None:
        """All languages; None where one of the roles is not known."""
        if self.primary is None or self.expanded is None:
            return None
        return self.primary + self.expanded


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer, or the tokenizer in a model's folder."""

    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class TokensFacts:
    """Token shards."""

    vocab_size: int | None
    """Ids of the tokenizer that makes them."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model with its tokenizer."""

    model_type: str
    """As in `config.json`."""
    config: ModelConfig | None
    """None for a model of `transformers`."""
    vocab_size: int | None = None
    """Ids of its tokenizer, where they may differ from the rows of the embedding."""
    origin: Path | None = None
    """The given folder that it is or comes from, for messages."""


def corpus_facts(planned: PlannedInput) -> CorpusFacts | None:
    """Return what is known of a corpus."""
    if not planned.exists:
        return planned.facts if isinstance(planned.facts, CorpusFacts) else None
    if not (planned.path / "roles.json").is_file():
        return None
    roles = load_roles(planned.path)
    parts = {
        part: folder_bytes(planned.path / part)
        for part in ("documents", "dialogues", "questions/train", "code.jsonl")
    }
    return CorpusFacts(primary=roles.primary, expanded=roles.expanded, chat=roles.chat, part_bytes=parts)


def folder_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; 0 where there is none."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


def model_facts(planned: PlannedInput) -> ModelFacts | None:
    """Return what is known of a model; raise `UserError` where a given folder is no model."""
    from koine.model.formats.config_json import decoder_types, read_config
    from koine.model.formats.weight_files import check_adapter

    if not planned.exists:
        return planned.facts if isinstance(planned.facts, ModelFacts) else None
    path = planned.path
    if not path.is_dir():
        raise UserError(
            "is a file, not the folder of a model", where=path, hint="give a folder with config.json"
        )
    check_adapter(path)
    if not (path / "config.json").is_file():
        raise UserError(
            "holds no config.json, so it is no model",
            where=path,
            hint="give the folder of a model, not of a run or a checkpoint",
        )
    value = read_json_object(path / "config.json", hint="it is no model's configuration")
    kind = str(value.get("model_type"))
    return ModelFacts(
        model_type=kind,
        config=read_config(path) if kind in decoder_types() else None,
        vocab_size=tokenizer_size(path),
        origin=path,
    )


def own_model(planned: PlannedInput) -> ModelConfig | None:
    """Return the configuration of a model that Koine's own decoder must compute; None where unknown.

    Raises `UserError` for any other architecture, and for weights that do not belong to `config.json`.
    """
    from koine.model.formats.config_json import decoder_types

    facts = model_facts(planned)
    if facts is None:
        return None
    if facts.config is None:
        raise UserError(
            f"is a model of type {facts.model_type}, and this recipe or step computes with Koine's own decoder",
            where=facts.origin or planned.path,
            hint=f"it computes {', '.join(decoder_types())}; this one can be evaluated, answered with, adapted, "
            "trained and merged through transformers, and not upcycled, given another attention or sharded",
        )
    if planned.exists:
        from koine.model.formats.directory import open_weights

        open_weights(planned.path, facts.config)
    return facts.config


def dense_model(planned: PlannedInput) -> ModelConfig | None:
    """Return `own_model`; raise `UserError` for a mixture of experts."""
    config = own_model(planned)
    if config is not None and config.mixture is not None:
        raise UserError("is a mixture of experts already", where=planned.path, hint="give a dense model")
    return config


def vocabulary_size(planned: PlannedInput) -> int | None:
    """Return the number of ids of a tokenizer, or of a model's tokenizer; None where unknown.

    Raises `UserError` where a given folder holds no tokenizer, or one that we cannot use.
    """
    if not planned.exists:
        facts = planned.facts
        return facts.vocab_size if isinstance(facts, TokenizerFacts | ModelFacts | TokensFacts) else None
    if not planned.path.is_dir():
        raise UserError(
            "is a file, and a folder with a model or a tokenizer is needed",
            where=planned.path,
            hint="give its folder",
        )
    found = tokenizer_size(planned.path)
    if found is None:
        raise UserError("holds no tokenizer.json", where=planned.path, hint="give a folder with a tokenizer")
    return found


def tokenizer_size(folder: Path) -> int | None:
    """Return the number of ids of a folder's tokenizer; None without `tokenizer.json`."""
    from koine.tokenizer import load_tokenizer

    return load_tokenizer(folder).vocab_size if (folder / "tokenizer.json").is_file() else None


def tokens_vocabulary(planned: PlannedInput) -> int | None:
    """Return the number of ids of token shards; None where unknown."""
    if not planned.exists:
        return planned.facts.vocab_size if isinstance(planned.facts, TokensFacts) else None
    manifest = planned.path / "tokens" / "manifest.json"
    found = read_json(manifest).get("vocab_size") if manifest.is_file() else None
    return found if isinstance(found, int) else None
