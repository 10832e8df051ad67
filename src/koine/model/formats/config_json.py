"""Read and write `config.json`: as Cohere or Cohere2 where the model is one of them, else as `koine`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.fields import Fields, short_repr
from koine.files import read_json_object
from koine.model.config import (
    LONGEST_WINDOW,
    MOST_LAYERS,
    SIZES,
    TOKEN_ID,
    LayerSpec,
    MixtureConfig,
    ModelConfig,
)
from koine.model.formats.weight_files import check_adapter

OWN_TYPES = ("cohere", "cohere2", "koine")
_ARCHITECTURE = {"cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM", "koine": "KoineForCausalLM"}


def model_type(config: ModelConfig) -> str:
    """Return the `transformers` class that is exactly this model, `koine` without one.

    Cohere: every layer full with RoPE. Cohere2: windowed layers (one window for all) with RoPE, full ones
        without, no QK-norm. Experts: `koine`.
    """
    layers = config.layers
    if config.mixture is not None:
        return "koine"
    if all(layer.window is None and layer.rope and layer.qk_norm == layers[0].qk_norm for layer in layers):
        # Cohere in transformers takes head_dim from the configuration, or derives it.
        return "cohere"
    windows = {layer.window for layer in layers if layer.window is not None}
    hybrid = all((layer.window is not None) == layer.rope and not layer.qk_norm for layer in layers)
    return "cohere2" if hybrid and len(windows) <= 1 else "koine"


def to_json(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Return the content of `config.json`."""
    kind = model_type(config)
    value: dict[str, Any] = {
        "architectures": [_ARCHITECTURE[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.logit_scale,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "use_cache": True,
    }
    if kind == "cohere":
        value["use_qk_norm"] = config.layers[0].qk_norm
    elif kind == "cohere2":
        # A model of full layers alone has no window, but Cohere2's configuration requires one.
        windows = [layer.window for layer in config.layers if layer.window is not None]
        value["sliding_window"] = windows[0] if windows else config.max_position_embeddings
        value["layer_types"] = [
            "full_attention" if layer.window is None else "sliding_attention" for layer in config.layers
        ]
    else:
        value["layers"] = [
            {"window": layer.window, "rope": layer.rope, "qk_norm": layer.qk_norm} for layer in config.layers
        ]
        if config.mixture is not None:
            value["mixture"] = dataclasses.asdict(config.mixture) | {"experts": list(config.mixture.experts)}
    return value


class UnsupportedModelError(UserError):
    """A Cohere or Cohere2 with a feature that our decoder lacks and `transformers` has."""


def from_json(value: dict[str, Any], *, where: Path) -> ModelConfig:
    """Build a `ModelConfig` from the content of a Cohere, Cohere2 or Koine `config.json`.

    Missing optional fields have the default of `transformers`.

    Raises:
        UserError: another `model_type`, a missing field or one of the wrong type.
        UnsupportedModelError: a feature that our decoder lacks.
    """
    kind = value.get("model_type")
    if not isinstance(kind, str) or kind not in OWN_TYPES:
        raise UserError(
            f"model_type {short_repr(kind)} is not one that Koine's own decoder implements "
            f"({', '.join(OWN_TYPES)})",
            where=where,
            hint="steps that take any causal LM open it through transformers (pip install 'koine-lm[hf]')",
        )
    fields = Fields(value, where, hint_if_broken="the file is not a whole config.json")
    rope = fields.inner("rope_parameters", None) or fields.inner("rope_scaling", None) or Fields({}, where)
    _check_supported(fields, rope)
    heads, hidden = _size(fields, "num_attention_heads", "num_heads"), _size(fields, "hidden_size")
    theta = rope.number("rope_theta", None)
    if theta is None:
        theta = fields.number("rope_theta", 500_000.0 if kind == "cohere" else 10_000.0)
    try:
        return ModelConfig(
            vocab_size=_size(fields, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(fields, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=_size(fields, "num_key_value_heads", "num_kv_heads", heads),
            head_dim=_size(fields, "head_dim", "head_dim", max(1, hidden // heads)),
            layers=_layers(fields, kind, fields.integer("num_hidden_layers", low=1, high=MOST_LAYERS)),
            mixture=_mixture(fields) if kind == "koine" else None,
            rope_theta=theta,
            norm_eps=fields.number("layer_norm_eps", 1e-5),
            logit_scale=fields.number("logit_scale", 0.0625),
            tie_embeddings=fields.boolean("tie_word_embeddings", True),
            initializer_range=fields.number("initializer_range", 0.02),
            max_position_embeddings=_size(fields, "max_position_embeddings", "max_position_embeddings", 8192),
            pad_token_id=_token_id(fields, "pad_token_id", 0),
            bos_token_id=_token_id(fields, "bos_token_id", 5),
            eos_token_id=_token_id(fields, "eos_token_id", 255_001),
        )
    except UserError as error:
        raise type(error)(error.what, where=error.where or where, hint=error.hint) from None


def _check_supported(fields: Fields, rope: Fields) -> None:
    rope_type = rope.text("rope_type", None) or rope.text("type", "default")
    partial = rope.number("partial_rotary_factor", None)
    if partial is None:
        partial = fields.number("partial_rotary_factor", 1.0)
    found = {
        "attention_bias": (fields.boolean("attention_bias", False), False),
        "hidden_act": (fields.text("hidden_act", "silu"), "silu"),
        "rope_type": (rope_type, "default"),
        "partial_rotary_factor": (partial, 1.0),
    }
    for name, (got, only) in found.items():
        if got != only:
            raise UnsupportedModelError(
                f"{name} is {short_repr(got)}",
                where=fields.where,
                hint=f"Koine's own decoder implements {only!r} only",
            )


def _size(fields: Fields, name: str, ours: str | None = None, *default: int) -> int:
    """Read a size, by its name in the file and our name."""
    got: int = fields.integer(name, *default, low=1, high=SIZES[ours or name])
    return got


def _token_id(fields: Fields, name: str, default: int) -> int:
    """Read a token id, or the first of several."""
    got = fields.get(name, default)
    if isinstance(got, list) and got:
        got = got[0]
    if isinstance(got, bool) or not isinstance(got, int) or not TOKEN_ID[0] <= got <= TOKEN_ID[1]:
        raise fields.wrong(name, "a token id")
    return got


def _one_a_layer(fields: Fields, name: str, count: int) -> list[Any]:
    got: list[Any] = fields.entries(name)
    if len(got) != count:
        raise UserError(
            f"'{name}' has {len(got)} entries and num_hidden_layers is {count}",
            where=fields.where,
            hint="give one entry per layer",
        )
    return got


def _layers(fields: Fields, kind: str, count: int) -> tuple[LayerSpec, ...]:
    if kind == "koine":
        return tuple(_own_layer(fields, layer) for layer in _one_a_layer(fields, "layers", count))
    if kind == "cohere":
        return (LayerSpec(qk_norm=fields.boolean("use_qk_norm", False)),) * count
    if fields.value.get("layer_types") is None:
        every = fields.integer("sliding_window_pattern", 4, low=1)
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    else:
        types = _one_a_layer(fields, "layer_types", count)
    unknown = [name for name in types if name not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UnsupportedModelError(
            f"layer_types holds {short_repr(unknown[0])}",
            where=fields.where,
            hint="Koine's own decoder implements 'sliding_attention' and 'full_attention' only",
        )
    window = fields.integer("sliding_window", 4096, low=1, high=LONGEST_WINDOW)
    return tuple(
        LayerSpec(window=window) if name == "sliding_attention" else LayerSpec(rope=False) for name in types
    )


def _own_layer(fields: Fields, layer: Any) -> LayerSpec:
    known = {field.name for field in dataclasses.fields(LayerSpec)}
    if not isinstance(layer, dict) or not layer.keys() <= known:
        raise fields.wrong("layers", f"a list of objects with the keys {', '.join(sorted(known))}")
    inner = Fields(layer, fields.where)
    return LayerSpec(
        window=inner.integer("window", None, low=1, high=LONGEST_WINDOW),
        rope=inner.boolean("rope", True),
        qk_norm=inner.boolean("qk_norm", False),
    )


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
