"""Tokenizers of a merge: which one the result has, whether they are equal, and their files."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from koine.combine.compatibility import model_configuration, tokenizer_differences
from koine.errors import KoineWarning, UserError
from koine.files import copy_tree, read_json, write_json
from koine.model.formats.carried_files import TOKENIZER_FILES
from koine.model.formats.library_config import VOCABULARY_FIELD

OTHER_VOCABULARY_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER, CONFIG, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
GENERATION = "generation_config.json"
TOKEN_ID_ENDINGS = ("_token_id", "_token_ids", "_token_index")
"""Endings of the names of fields that hold token ids."""


def tokenizer_source(paths: Sequence[Path], *, with_base: bool, policy: str) -> int:
    """Return the index of the model whose tokenizer and chat template the result has.

    Args:
        paths: The models; the base last, where there is one.
        with_base: Whether there is one.
        policy: `first` or empty, `base`, or the folder of one of the models.
    """
    if policy in ("", "first"):
        return 0
    if policy == "base":
        if not with_base:
            raise UserError("there is no base", where="--tokenizer", hint="give first, or a model's folder")
        return len(paths) - 1
    for index, path in enumerate(paths):
        if Path(policy).resolve() == path.resolve():
            return index
    raise UserError(
        f"'{policy}' is none of the models", where="--tokenizer", hint="give first, base, or a model"
    )


def check_same_tokenizers(paths: Sequence[Path]) -> None:
    """Raise `UserError` where tokenizers of equal vocabularies encode text differently.

    They may have other merges or another normaliser. Folders without a tokenizer.json are compared by their
    vocabularies in other formats.
    """
    if not (paths[0] / TOKENIZER).exists():
        for name in OTHER_VOCABULARY_FILES:
            contents = [(path / name).read_bytes() if (path / name).is_file() else None for path in paths]
            for path, content in zip(paths, contents, strict=True):
                if None not in (content, contents[0]) and content != contents[0]:
                    raise UserError(
                        f"is another than that of {paths[0]}",
                        where=path / name,
                        hint="say whose the result has: --tokenizer first, base, or a model's folder",
                    )
        return
    for path in paths[1:]:
        differing = tokenizer_differences(paths[0], path)
        if differing:
            raise UserError(
                f"its tokenizer is another than that of {paths[0]} (they differ in {', '.join(differing)})",
                where=path / TOKENIZER,
                hint="say whose the result has: --tokenizer first, base, or a model's folder",
            )


def warn_if_templates_differ(models: Sequence[Path]) -> None:
    """Warn (`KoineWarning`) where chat templates differ; the result has the first model's."""
    templates = [_template(path) for path in models]
    other = next((path for path, one in zip(models, templates, strict=True) if one != templates[0]), None)
    if other is not None:
        warnings.warn(
            f"the chat template of {other} is another than that of {models[0]}, which is kept; "
            "--tokenizer MODEL says whose the result has",
            KoineWarning,
            stacklevel=2,
        )


def _template(path: Path) -> str | None:
    """Return the chat template of a folder; None where it has none."""
    if (path / TEMPLATE).exists():
        return (path / TEMPLATE).read_text(encoding="utf-8")
    content = read_json(path / CONFIG) if (path / CONFIG).exists() else {}
    template = content.get("chat_template") if isinstance(content, dict) else None
    return None if template is None else str(template)


def write_tokenizer(source: Path, folder: Path, config: dict[str, Any]) -> None:
    """Copy the tokenizer's files and chat templates of `source` into `folder`.

    Vocabulary sizes and token ids are set in `config` and in `generation_config.json`.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_dir():
            copy_tree(source / name, folder / name)
        elif (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    theirs = model_configuration(source)
    for part in ("", "text_config"):
        ours, other = (config.get(part), theirs.get(part)) if part else (config, theirs)
        if isinstance(ours, dict) and isinstance(other, dict):
            _take_vocabulary(ours, other)
    generation = folder / GENERATION
    if generation.exists():
        settings = _json_object(generation)
        own = _json_object(source / GENERATION) if (source / GENERATION).exists() else theirs
        write_json(
            generation, {**settings, **{key: own[key] for key in own if key.endswith(TOKEN_ID_ENDINGS)}}
        )


def _take_vocabulary(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Copy vocabulary sizes and token ids; a size that `theirs` leaves to its class is removed."""
    for key in [key for key in ours if key.startswith(VOCABULARY_FIELD) and key not in theirs]:
        del ours[key]
    ours.update(
        {
            key: one
            for key, one in theirs.items()
            if key.startswith(VOCABULARY_FIELD) or key.endswith(TOKEN_ID_ENDINGS)
        }
    )


def read_token_ids(path: Path) -> dict[str, int] | None:
    """Return the id of every token of a folder's tokenizer.json; None without one; raise `UserError`."""
    file = path / TOKENIZER
    if not file.exists():
        return None
    content = read_json(file)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary: Any = model.get("vocab") if isinstance(model, dict) else None
    added: Any = (content.get("added_tokens") or []) if isinstance(content, dict) else None
    try:
        if isinstance(vocabulary, list):
            # Unigram models hold pairs of a token and its score.
            vocabulary = {str(pair[0]): index for index, pair in enumerate(vocabulary)}
        found = {**vocabulary, **{str(token["content"]): token["id"] for token in added}}
    except (TypeError, KeyError, IndexError):
        found = {}
    if not found or not all(type(one) is int and one >= 0 for one in found.values()):
        raise UserError("holds no vocabulary", where=file, hint="it is damaged or of an unknown kind")
    return found


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, hint="correct or remove it")
    return content
