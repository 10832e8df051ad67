"""Read and write `config.json`: as a class of `transformers` where the model is one, else as `koine`."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.fields import Fields, short_repr
from koine.files import read_json_object
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig, QKNorm, RopeScaling
from koine.model.families import families
from koine.model.families.family import OWN_NAMES, Family, TensorNames
from koine.model.families.reading import UnsupportedModelError, layer_count, one_a_layer
from koine.model.families.unknown_fields import check_code, check_unknown_fields
from koine.model.formats.weight_files import check_adapter

OWN_TYPE = "koine"
"""The `model_type` of a model that no class of `transformers` computes."""
UNREAD = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Fields that are not carried: each saving writes its own."""
_BEFORE = {
    "hidden_act": "activation", "layer_norm_eps": "norm_eps", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
"""Names in `koine` folders written before the decoder computed more than Cohere."""


def decoder_types() -> tuple[str, ...]:
    """Return every `model_type` that our decoder computes."""
    return (*families(), OWN_TYPE)


def saved_family(config: ModelConfig) -> Family | None:
    """Return the class that is exactly this model; None without one.

    It is the one that the model was read from where that can hold it, else the first that can.
    """
    return _saved_family(config, config.model_type)


@functools.lru_cache(maxsize=64)
def _saved_family(config: ModelConfig, kind: str) -> Family | None:
    known = families()
    first = known.get(kind)
    candidates = [family for family in known.values() if family is not first]
    for family in candidates if first is None else [first, *candidates]:
        if _holds(family, config):
            return family
    return None


def _holds(family: Family, config: ModelConfig) -> bool:
    """Return whether a configuration comes back from a class's fields."""
    try:
        again = family.read(Fields(family.write(config), Path("config.json")))
    except UserError:
        return False
    return _canonical(again) == _canonical(config)


def _canonical(config: ModelConfig) -> ModelConfig:
    """Return a configuration with what says the same spelled in one way."""
    layers = tuple(
        dataclasses.replace(layer, rope_theta=None) if _own_base_is_plain(config, layer) else layer
        for layer in config.layers
    )
    scale = config.attention_scale
    default = scale is not None and math.isclose(scale, config.head_dim**-0.5)
    return dataclasses.replace(config, layers=layers, attention_scale=None if default else scale)


def _own_base_is_plain(config: ModelConfig, layer: LayerSpec) -> bool:
    return layer.rope_theta == config.rope_theta and config.rope_scaling is None


def model_type(config: ModelConfig) -> str:
    """Return the `model_type` that a model is saved as."""
    family = saved_family(config)
    return OWN_TYPE if family is None else family.model_type


def stored_names(config: ModelConfig) -> TensorNames:
    """Return what the tensors of a saved model are called."""
    family = saved_family(config)
    return OWN_NAMES if family is None else family.names


def to_json(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    family = saved_family(config)
    if family is None:
        kind, architecture, fields = OWN_TYPE, "KoineForCausalLM", _own_json(config)
    else:
        kind, architecture, fields = family.model_type, family.architecture, family.write(config)
    carried = {name: json.loads(text) for name, text in config.carried} if kind == config.model_type else {}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "dtype": dtype,
        "use_cache": True,
        **carried,
        **fields,
    }


def from_json(value: dict[str, Any], *, where: Path) -> ModelConfig:
    """Build a `ModelConfig` from the content of a `config.json`.

    Missing optional fields have the default of `transformers`.

    Raises:
        UserError: another `model_type`, a missing field or one of the wrong type.
        UnsupportedModelError: a feature that our decoder lacks.
    """
    kind = value.get("model_type")
    if not isinstance(kind, str) or kind not in decoder_types():
        raise UserError(
            f"model_type {short_repr(kind)} is not one that Koine's own decoder implements "
            f"({', '.join(decoder_types())})",
            where=where,
            hint="steps that take any causal LM open it through transformers (pip install 'koine-lm[hf]')",
        )
    fields = Fields(value, where, hint_if_broken="the file is not a whole config.json")
    try:
        if kind == OWN_TYPE:
            return _from_own_json(fields)
        if value.get("quantization_config") is not None:
            raise UnsupportedModelError(
                "quantization_config is given", hint="Koine's own decoder computes weights of floating point"
            )
        family = families()[kind]
        check_code(fields, family.architecture)
        config = family.read(fields)
        check_unknown_fields(fields)
        return dataclasses.replace(config, carried=_carried(fields))
    except UserError as error:
        raise type(error)(error.what, where=error.where or where, hint=error.hint) from None


def _carried(fields: Fields) -> tuple[tuple[str, str], ...]:
    """Return the fields that nothing read, and a list of EOS ids, of which the first is used."""
    names = fields.value.keys() - fields.names_read - set(UNREAD)
    if isinstance(fields.value.get("eos_token_id"), list):
        names.add("eos_token_id")
    return tuple((name, json.dumps(fields.value[name])) for name in sorted(names))


# -- folders of our own type ---------------------------------------------------------------------------------


def _own_json(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a `koine` folder: those of `ModelConfig`, with the names of `transformers`."""
    value = dataclasses.asdict(dataclasses.replace(config, carried=()))
    for name in ("carried", "model_type"):
        del value[name]
    value["init_from_type"] = config.model_type
    for theirs, ours in _BEFORE.items():
        value[theirs] = value.pop(ours)
    value["num_hidden_layers"] = len(config.layers)
    value["rope_parameters"] = {"rope_type": "default", "rope_theta": value.pop("rope_theta")}
    value["layers"] = [dataclasses.asdict(layer) for layer in config.layers]
    if config.mixture is not None:
        value["mixture"]["experts"] = list(config.mixture.experts)
    return {name: one for name, one in value.items() if one is not None}


def _from_own_json(fields: Fields) -> ModelConfig:
    value = dict(fields.value)
    rope = fields.inner("rope_parameters", None)
    count = layer_count(fields)
    layers = tuple(_own_layer(fields, layer) for layer in one_a_layer(fields, "layers", count))
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"layers", "mixture", "carried"}
    for theirs, ours in _BEFORE.items():
        if theirs in value:
            value[ours] = value.pop(theirs)
    if value.pop("attention_bias", None):
        value["attention_bias"] = True
    given = {name: one for name, one in value.items() if name in known - {"model_type"} and one is not None}
    if rope is not None:
        given["rope_theta"] = rope.number("rope_theta", 10_000.0)
    scaling = fields.inner("rope_scaling", None)
    if scaling is not None:
        scaling.check_known({field.name for field in dataclasses.fields(RopeScaling)})
        given["rope_scaling"] = RopeScaling(**scaling.value)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_heads")
    names = {ours: theirs for theirs, ours in _BEFORE.items()}
    for name in required:
        fields.get(names.get(name, name))
    given.setdefault("num_kv_heads", given["num_heads"])
    if "head_dim" not in given:
        heads = fields.integer("num_attention_heads", low=1)
        given["head_dim"] = max(1, fields.integer("hidden_size", low=1) // heads)
    given.setdefault("logit_scale", 0.0625)
    given.setdefault("max_position_embeddings", 8192)
    given.setdefault("eos_token_id", 255_001)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(given.get(name), list) and given[name]:
            given[name] = given[name][0]
    return ModelConfig(
        **given,
        layers=layers,
        mixture=_mixture(fields),
        model_type=fields.text("init_from_type", ""),
    )


def _own_layer(fields: Fields, layer: Any) -> LayerSpec:
    known = {field.name for field in dataclasses.fields(LayerSpec)}
    if not isinstance(layer, dict) or not layer.keys() <= known:
        raise fields.wrong("layers", f"a list of objects with the keys {', '.join(sorted(known))}")
    given = {name: one for name, one in layer.items() if one is not None}
    # Before there were several kinds, the field said whether there is a norm.
    former: dict[Any, QKNorm | None] = {True: "heads", False: None}
    if isinstance(given.get("qk_norm"), bool):
        given["qk_norm"] = former[given["qk_norm"]]
    return LayerSpec(**given)


def _mixture(fields: Fields) -> MixtureConfig | None:
    value = fields.value.get("mixture")
    if value is None:
        return None
    known = {field.name for field in dataclasses.fields(MixtureConfig)}
    names = value.get("experts") if isinstance(value, dict) else None
    if (
        not isinstance(value, dict)
        or not value.keys() <= known
        or not (isinstance(names, list) and all(isinstance(name, str) for name in names))
    ):
        raise fields.wrong("mixture", f"an object with the keys {', '.join(sorted(known))}")
    # Null means the default, as everywhere in the file. Other values are checked by MixtureConfig.
    given = {name: entry for name, entry in value.items() if entry is not None}
    return MixtureConfig(**{**given, "experts": tuple(names)})


def read_config(path: Path) -> ModelConfig:
    """Read the configuration of a model directory."""
    path = Path(path)
    if not path.is_dir():
        raise UserError("no such model directory", where=path, hint="give a folder that holds config.json")
    check_adapter(path)
    if not (path / "config.json").exists():
        raise UserError(
            "holds no config.json",
            where=path,
            hint="give the folder of a model, not of a run or a checkpoint",
        )
    value = read_json_object(path / "config.json", hint="it is no model's configuration")
    return from_json(value, where=path / "config.json")
