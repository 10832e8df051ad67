"""Whether models fit together: configurations of one function, tokenizers that cut text alike, and a common ancestor."""

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
from koine.model.config import MixtureConfig, ModelConfig
from koine.model.formats.config_json import OWN_TYPES, UnsupportedModelError, from_json
from koine.model.formats.library_config import declared_fields, library_config

MIN_RELATED_COSINE = 0.2
"""Cosine of the matrices of two models below which they have no common ancestor: that of two models trained from different random weights is
within a few hundredths of 0, and a branch of billions of tokens stays far above."""

COMPARED = 4_000_000
"""Entries of a matrix that are compared."""

OF_TRAINING = frozenset({"initializer_range", "load_balancing", "z_loss"})
"""Fields of our own configuration that say how weights begin or are trained, not what they compute."""

OF_THE_VOCABULARY = frozenset({"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"})
"""Fields that follow from the tokenizer, which is compared by itself."""

NO_FUNCTION = OF_TRAINING | OF_THE_VOCABULARY | {
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "problem_type", "gradient_checkpointing", "quantization_config",
    "router_aux_loss_coef", "output_router_logits", "initializer_factor", "task_specific_params", "pretraining_tp", "chunk_size_feed_forward",
    "layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate", "attn_implementation", "name_or_path",
}  # fmt: skip
"""Fields of a `config.json` that do not change what the same weights compute."""


def _matters(name: str) -> bool:
    """Return whether a field may change what the same weights compute.

    Dropout only trains; what begins with _ is a note of the library's own.
    """
    return not (
        name in NO_FUNCTION
        or name.startswith("_")
        or "dropout" in name
        or name.endswith(("_pdrop", "_token_id", "_token_ids", "_token_index"))
    )


def model_configuration(path: Path) -> dict[str, Any]:
    """The content of `config.json`; empty where there is none. Raises `UserError` where it is no JSON object."""
    where = path / "config.json"
    content = read_json(where) if where.exists() else {}
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=where, hint="it is no model's configuration")
    return content


def field_difference(
    wanted: ModelConfig | MixtureConfig, found: ModelConfig | MixtureConfig, *, but: Collection[str]
) -> tuple[str, Any, Any] | None:
    """The first field, but for some, in which two configurations differ: its name and both values."""
    for field in dataclasses.fields(wanted):
        if field.name in but:
            continue
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if isinstance(ours, MixtureConfig) and isinstance(theirs, MixtureConfig):
            inner = field_difference(ours, theirs, but=but)
            if inner is not None:
                return (f"{field.name}.{inner[0]}", *inner[1:])
        elif ours != theirs:
            if field.name == "layers":
                ours, theirs = f"{len(ours)} of one kind", f"{len(theirs)} of another"
            return field.name, ours, theirs
    return None


def check_same_function(wanted: Path, found: Path) -> None:
    """Raise `UserError` where the same weights would compute something else by one model's `config.json` than by the other's."""
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
        # Only the class knows the default of a field that a file leaves out, or that the field is none of its
        # own.
        unsure = None in (one, other) and library_config(ours, where=wanted / "config.json") is None
        raise UserError(
            f"{name} is {_shown(other)}, and {_shown(one)} in {wanted}",
            where=found / "config.json",
            hint=f"whether that changes what the model computes, transformers knows: {_way(kinds[0])}"
            if unsure
            else "the same weights compute something else then: models of one configuration can be merged",
        )


def _way(kind: Any) -> str:
    if importlib.util.find_spec("transformers") is None:
        return "pip install 'koine[hf]'"
    return f"but this version has no class for {kind}; where it does not, write the same into both files"


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "not said" if value is None else str(value)


def _difference(
    ours: dict[str, Any], theirs: dict[str, Any], wanted: Path, found: Path
) -> tuple[str, Any, Any] | None:
    if ours == theirs:
        return None
    if ours.get("model_type") in OWN_TYPES:
        try:
            configs = [
                from_json(value, where=path / "config.json")
                for value, path in ((ours, wanted), (theirs, found))
            ]
        except UnsupportedModelError:
            pass
        else:
            but = {*OF_TRAINING, *OF_THE_VOCABULARY, "max_position_embeddings"}
            return field_difference(configs[0], configs[1], but=but)
    if _flat(ours) == _flat(theirs):
        return None
    flat = [_flat(_as_the_class_reads(value, path)) for value, path in ((ours, wanted), (theirs, found))]
    # What the files say themselves comes first: the rest may follow from it.
    said = {**_flat(ours), **_flat(theirs)}
    for name in sorted({**flat[0], **flat[1]}, key=lambda name: name not in said):
        one, other = flat[0].get(name), flat[1].get(name)
        if one != other:
            return name, one, other
    return None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields that matter, those of nested configurations by `outer.inner`."""
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


def _as_the_class_reads(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """The fields of the architecture's class, with its defaults.

    The file's own fields where the library or the architecture is unknown.
    """
    config = library_config(value, where=path / "config.json")
    if config is None:
        return value
    fields = declared_fields(config)
    if fields.get("layer_types"):
        # Read for nothing but the kinds of the layers.
        fields.pop("max_window_layers", None)
    return fields


def ties_embeddings(path: Path) -> bool | None:
    """Return whether a model's head is its embedding; None where that is not known.

    Read from its `config.json`, or from the default of its class.
    """
    content = model_configuration(path)
    if content.get("model_type") in OWN_TYPES:
        try:
            return from_json(content, where=path / "config.json").tie_embeddings
        except UnsupportedModelError:
            pass
    said = content.get("tie_word_embeddings")
    if said is None:
        config = library_config(content, where=path / "config.json")
        said = getattr(config, "tie_word_embeddings", None)
    return said if isinstance(said, bool) else None


def tokenizer_differences(wanted: Path, found: Path) -> list[str]:
    """The parts of two folders' `tokenizer.json` in which they cut text otherwise or number it otherwise."""
    first, second = (_essence(path / "tokenizer.json") for path in (wanted, found))
    return [key for key in first if first[key] != second[key]]


def _essence(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("is not a JSON object", where=path, hint="it is no tokenizer")
    parts = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
    essence = {key: content.get(key) for key in parts}
    if isinstance(essence["model"], dict):
        # Older files write a merge as one string, and leave out switches that are off.
        model = {
            key: value for key, value in essence["model"].items() if value is not None and value is not False
        }
        if isinstance(model.get("merges"), list):
            model["merges"] = [
                merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
            ]
        essence["model"] = model
    return essence


def cosine(first: Tensor, second: Tensor) -> float | None:
    """Of two tensors as vectors, of their first `COMPARED` entries; None where it says nothing: one is 0 or not finite."""
    a, b = (tensor.flatten()[:COMPARED].double() for tensor in (first, second))
    norms = float(a.norm() * b.norm())
    value = float(a @ b) / norms if norms else float("nan")
    return value if value == value else None


def median_cosine(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The median cosine of several tensors of two models; None where none says anything."""
    found = [value for value in (cosine(first, second) for first, second in pairs) if value is not None]
    return statistics.median(found) if found else None
