"""Whether models fit together: equal configurations, equal tokenizers, a common ancestor."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from koine.errors import UserError
from koine.files import read_json
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.model.families.reading import UnsupportedModelError
from koine.model.formats.config_json import OWN_TYPE, from_json
from koine.model.formats.library_config import declared_fields, library_config

READ_AS_OURS = ("cohere", "cohere2", OWN_TYPE)
"""Types whose configurations are compared as our decoder reads them; others by the fields of their class."""

MIN_RELATED_COSINE = 0.2
"""Least cosine of two models' matrices with a common ancestor.

The cosine of models trained from different random weights is within a few hundredths of 0. A branch of
billions of tokens stays far above.
"""

COMPARED_ENTRIES = 4_000_000
"""Entries of a matrix that are compared."""

TRAINING_FIELDS = frozenset({"initializer_range", "load_balancing", "z_loss"})
"""Fields of our own configuration for initialisation and training, which do not change the function."""

VOCABULARY_FIELDS = frozenset({"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"})
"""Fields that follow from the tokenizer, which is compared by itself."""

IGNORED_FIELDS = TRAINING_FIELDS | VOCABULARY_FIELDS | {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "max_position_embeddings", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "problem_type", "gradient_checkpointing", "quantization_config", "router_aux_loss_coef",
    "output_router_logits", "initializer_factor", "task_specific_params", "pretraining_tp",
    "chunk_size_feed_forward", "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate",
    "attn_implementation", "name_or_path",
}  # fmt: skip
"""Fields of a `config.json` that do not change what the same weights compute."""


def _matters(name: str) -> bool:
    """Return whether a field may change what the same weights compute.

    Dropout acts in training only. A name that begins with `_` is the library's own.
    """
    return not (
        name in IGNORED_FIELDS
        or name.startswith("_")
        or "dropout" in name
        or name.endswith(("_pdrop", "_token_id", "_token_ids", "_token_index"))
    )


def model_configuration(path: Path) -> dict[str, Any]:
    """Return the content of `config.json`, empty without one; raise `UserError` where it is no object."""
    where = path / "config.json"
    content = read_json(where) if where.exists() else {}
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=where, hint="it is no model's configuration")
    return content


def field_difference(
    wanted: ModelConfig | MixtureConfig, found: ModelConfig | MixtureConfig, *, ignoring: Collection[str]
) -> tuple[str, Any, Any] | None:
    """Return the first field in which two configurations differ, and both values; None where none does.

    Fields named in `ignoring` are not compared.
    """
    for field in dataclasses.fields(wanted):
        if not field.compare or field.name in ignoring:
            continue
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if isinstance(ours, MixtureConfig) and isinstance(theirs, MixtureConfig):
            inner = field_difference(ours, theirs, ignoring=ignoring)
            if inner is not None:
                return (f"{field.name}.{inner[0]}", *inner[1:])
        elif ours != theirs:
            return _layers_difference(ours, theirs) if field.name == "layers" else (field.name, ours, theirs)
    return None


def _layers_difference(ours: Sequence[LayerSpec], theirs: Sequence[LayerSpec]) -> tuple[str, Any, Any]:
    """Return the first field of a layer that differs, and both values; the counts where those differ."""
    if len(ours) != len(theirs):
        return "the number of layers", len(ours), len(theirs)
    index = next(index for index, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
    one, other = dataclasses.asdict(ours[index]), dataclasses.asdict(theirs[index])
    name = next(name for name in one if one[name] != other[name])
    return f"{name} of layer {index}", _value_text(one[name]), _value_text(other[name])


def check_same_function(wanted: Path, found: Path) -> None:
    """Raise `UserError` where the same weights compute something else under the other `config.json`."""
    ours, theirs = model_configuration(wanted), model_configuration(found)
    kinds = ours.get("model_type"), theirs.get("model_type")
    if kinds[0] != kinds[1]:
        raise UserError(
            f"is a {kinds[1]}, and {wanted} a {kinds[0]}",
            where=found,
            hint="models of one architecture can be merged",
        )
    difference = _difference(ours, theirs, wanted, found)
    if difference is not None:
        name, one, other = difference
        # Only the class knows the default of a field that a file leaves out, and whether it reads the field.
        unsure = None in (one, other) and library_config(ours, where=wanted / "config.json") is None
        raise UserError(
            f"{name} is {_value_text(other)}, and {_value_text(one)} in {wanted}",
            where=found / "config.json",
            hint=f"whether that changes what the model computes, transformers knows: {_how_to_ask(kinds[0])}"
            if unsure
            else "the same weights compute something else then: models of one configuration can be merged",
        )


def _how_to_ask(kind: Any) -> str:
    """Return how the user gets the answer of `transformers` for a model type."""
    if importlib.util.find_spec("transformers") is None:
        return "pip install 'koine-lm[hf]'"
    return f"but this version has no class for {kind}; where it does not, write the same into both files"


def _value_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "not given" if value is None else str(value)


def _difference(
    ours: dict[str, Any], theirs: dict[str, Any], wanted: Path, found: Path
) -> tuple[str, Any, Any] | None:
    """Return the first field that changes what weights compute, and both values; None where none does.

    Our own classes' configurations are compared as we read them, others by the fields that their class in
    `transformers` declares.
    """
    if ours == theirs:
        return None
    if ours.get("model_type") in READ_AS_OURS:
        try:
            configs = [
                from_json(value, where=path / "config.json")
                for value, path in ((ours, wanted), (theirs, found))
            ]
        except UnsupportedModelError:
            pass
        else:
            ignoring = {*TRAINING_FIELDS, *VOCABULARY_FIELDS, "max_position_embeddings"}
            return field_difference(configs[0], configs[1], ignoring=ignoring)
    if _flat(ours) == _flat(theirs):
        return None
    flat = [_flat(_class_fields(value, path)) for value, path in ((ours, wanted), (theirs, found))]
    # Fields that stand in the files come first: defaults may follow from them.
    in_files = {**_flat(ours), **_flat(theirs)}
    for name in sorted({**flat[0], **flat[1]}, key=lambda name: name not in in_files):
        one, other = flat[0].get(name), flat[1].get(name)
        if one != other:
            return name, one, other
    return None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields that matter; those of nested configurations are named `outer.inner`."""
    found: dict[str, Any] = {}
    for name, one in value.items():
        name = str(name)
        if not _matters(name):
            continue
        if isinstance(one, Mapping):
            found |= _flat(one, f"{prefix}{name}.")
        elif one is not None:
            found[prefix + name] = list(one) if isinstance(one, tuple | list) else one
    return found


def _class_fields(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields that the architecture's class declares, with its defaults.

    Without the library, or for an unknown architecture: the file's own fields.
    """
    config = library_config(value, where=path / "config.json")
    if config is None:
        return value
    fields = declared_fields(config)
    if fields.get("layer_types"):
        # Used for nothing but the layers' types.
        fields.pop("max_window_layers", None)
    return fields


def ties_embeddings(path: Path) -> bool | None:
    """Return whether a model's head is its embedding; None where neither file nor class says so."""
    content = model_configuration(path)
    if content.get("model_type") in READ_AS_OURS:
        try:
            return from_json(content, where=path / "config.json").tie_embeddings
        except UnsupportedModelError:
            pass
    tied = content.get("tie_word_embeddings")
    if tied is None:
        config = library_config(content, where=path / "config.json")
        tied = getattr(config, "tie_word_embeddings", None)
    return tied if isinstance(tied, bool) else None


def tokenizer_differences(wanted: Path, found: Path) -> list[str]:
    """Return the parts in which two folders' `tokenizer.json` encode text differently."""
    files = [path / "tokenizer.json" for path in (wanted, found)]
    if files[0].read_bytes() == files[1].read_bytes():
        return []
    first, second = (_encoding_parts(path / "tokenizer.json") for path in (wanted, found))
    return [key for key in first if first[key] != second[key]]


def _encoding_parts(path: Path) -> dict[str, Any]:
    """Return the parts of a `tokenizer.json` that decide how it encodes text."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, hint="it is no tokenizer")
    names = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    parts = {key: content.get(key) for key in names}
    if isinstance(parts["model"], dict):
        # Older files write a merge as one string, and leave out switches that are off.
        model = {
            key: value for key, value in parts["model"].items() if value is not None and value is not False
        }
        if isinstance(model.get("merges"), list):
            model["merges"] = [
                merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
            ]
        parts["model"] = model
    return parts


def cosine(first: Tensor, second: Tensor) -> float | None:
    """Return the cosine of the first `COMPARED_ENTRIES` entries; None where one tensor is 0 or not finite."""
    a, b = (tensor.flatten()[:COMPARED_ENTRIES].double() for tensor in (first, second))
    norms = float(a.norm() * b.norm())
    value = float(a @ b) / norms if norms else float("nan")
    return value if value == value else None


def median_cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return the median cosine of pairs of tensors; None where none has a cosine."""
    found = [value for value in (cosine(first, second) for first, second in pairs) if value is not None]
    return statistics.median(found) if found else None
