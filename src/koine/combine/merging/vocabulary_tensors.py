"""Find the tensors that have one row per token.

Where `transformers` knows the architecture, its class is built without weights, and again with one token
more: the tensors that grow have a row per token. For other architectures size and place decide: as many rows
as the vocabulary has ids, and no other dimension of the model of that length.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from koine.combine.compatibility import model_configuration
from koine.errors import UserError
from koine.model.formats.config_json import OWN_TYPE
from koine.model.formats.library_config import VOCABULARY_FIELD, Skeleton, skeleton
from koine.model.formats.safetensors_stream import Checkpoint, Entry

OWN_NAMES = ("model.embed_tokens.weight", "lm_head.weight")
"""These tensors in directories of our own decoder."""

MODULES = frozenset({
    "embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "tok_embeddings",
    "embed_tokens_per_layer", "shared",
})  # fmt: skip
"""Modules with a row per token. They decide where a length stands for several things."""


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the tensors with one entry or row per token, each with the dimension that counts tokens."""
    content = model_configuration(checkpoint.path)
    kind = content.get("model_type")
    if kind in (OWN_TYPE, "cohere", "cohere2"):
        return {name: 0 for name in OWN_NAMES if name in checkpoint}
    known = skeleton(content, where=checkpoint.path / "config.json") if kind is not None else None
    if known is None:
        by_size, unclear = _by_size(checkpoint, content)
        if unclear:
            raise UserError(
                f"{unclear[0]} is as long as the vocabulary and as other parts of the model: "
                "whether it has an entry a token is not known",
                where=checkpoint.path,
                hint="transformers would know (pip install 'koine-lm[hf]'), "
                "if it has a class for this model_type",
            )
        return dict.fromkeys(by_size, 0)
    found, unresolved = {}, []
    for name, entry in checkpoint.items():
        built = _name_in(known, name)
        if built is None:
            unresolved.append(name)
        elif built in known.vocabulary and len(known.shapes[built]) == len(entry.shape):
            found[name] = known.vocabulary[built]
    # Tensors that the library renames when it loads, or does not read, such as multi-token prediction heads.
    places = {_place(name): axis for name, axis in known.vocabulary.items()}
    sizes = set(_by_size(checkpoint, content)[0]) if unresolved else set()
    for name in unresolved:
        if _place(name) in places and checkpoint[name].shape:
            found[name] = places[_place(name)]
        elif name in sizes:
            found[name] = 0
    return found


def _name_in(known: Skeleton, name: str) -> str | None:
    """Return the library's name of a stored tensor; None where it has none.

    It is the same, or has the prefix of the part below the head added or removed.
    """
    prefix = f"{known.prefix}."
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in known.shapes:
            return candidate
    return None


def _place(name: str) -> str:
    """Return the last two parts of a name, such as `embed_tokens.weight`."""
    return ".".join(name.split(".")[-2:])


def vocabulary_sizes(content: Mapping[str, Any]) -> set[int]:
    """Return the vocabulary sizes in a `config.json`, at the top or in its text model."""
    nested = content.get("text_config")
    holders = [content, nested if isinstance(nested, Mapping) else {}]
    return {
        value
        for holder in holders
        for name, value in holder.items()
        if name.startswith(VOCABULARY_FIELD) and type(value) is int
    }


def _by_size(checkpoint: Checkpoint, content: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Find the tensors with a row per token by size and place.

    Returns:
        These tensors, and those outside the layers for which neither size nor place decides.
    """
    named = [name for name in checkpoint if name.split(".")[-2:-1] and name.split(".")[-2] in MODULES]
    sizes = vocabulary_sizes(content) or {
        checkpoint[name].rows for name in named if len(checkpoint[name].shape) == 2
    }
    # Lengths of other dimensions: later ones of a tensor, those of tensors that several layers have, and
    # other numbers of the configuration.
    others = {length for entry in checkpoint.values() for length in entry.shape[1:]} | _other_sizes(content)
    layers = Counter(
        (_without_numbers(name), entry.rows) for name, entry in checkpoint.items() if entry.shape
    )
    others |= {rows for (_, rows), count in layers.items() if count > 1}
    found, unclear = [], []
    for name, entry in checkpoint.items():
        if not entry.shape or entry.rows not in sizes:
            continue
        if name in named or entry.rows not in others:
            found.append(name)
        elif not any(part.isdigit() for part in name.split(".")):
            unclear.append(name)
    return found, unclear


def _other_sizes(content: Mapping[str, Any]) -> set[int]:
    """Return the integers of a configuration that are no vocabulary sizes: positions, segments, experts."""
    found: set[int] = set()
    for name, value in content.items():
        if isinstance(value, Mapping):
            found |= _other_sizes(value)
        elif type(value) is int and not name.startswith(VOCABULARY_FIELD):
            found.add(value)
    return found


def _without_numbers(name: str) -> str:
    """Return a name with `N` for each number, so that all layers have one name."""
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


def rows_first(checkpoint: Checkpoint, name: str, axis: int) -> int:
    """Drop the dimensions of length 1 before the one that counts tokens; return how many there were.

    Only the entry changes, its bytes stay.

    Raises:
        UserError: A longer dimension stands before it, so that a token's numbers do not lie together.
    """
    entry: Entry = checkpoint[name]
    if math.prod(entry.shape[:axis]) != 1:
        raise UserError(
            f"{name} counts tokens along dimension {axis} of {list(entry.shape)}",
            where=checkpoint.path,
            hint="models of one tokenizer can be merged; move the others to it with `koine tokenizer adapt`",
        )
    checkpoint.entries[name] = replace(entry, shape=entry.shape[axis:])
    return axis
