"""`config.json` in both directions: Cohere and Cohere2 where the model is one of them, our own `koine` where it is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import read_json
from koine.model.config import LayerSpec, MixtureConfig, ModelConfig
from koine.model.weight_files import refuse_adapter

OWN_TYPES = ("cohere", "cohere2", "koine")
_ARCHITECTURE = {"cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM", "koine": "KoineForCausalLM"}


def model_type(config: ModelConfig) -> str:
    """The `transformers` class that is exactly this model, or `koine` where there is none.

    Experts: `koine`. Cohere: every layer full with RoPE. Cohere2: windowed layers (one window for all) with RoPE, full ones without, no QK-norm.
    """
    layers = config.layers
    if config.mixture is not None:
        return "koine"
    if all(layer.window is None and layer.rope and layer.qk_norm == layers[0].qk_norm for layer in layers):
        # transformers' Cohere takes head_dim from its config where given, and derives it otherwise.
        return "cohere"
    windows = {layer.window for layer in layers if layer.window is not None}
    hybrid = all((layer.window is not None) == layer.rope and not layer.qk_norm for layer in layers)
    return "cohere2" if hybrid and len(windows) <= 1 else "koine"


def to_json(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The content of `config.json`."""
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
        # A model of full layers alone has no window; Cohere2's configuration wants one all the same.
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
    """A Cohere or Cohere2 with a feature that these maths do not have; `transformers` can open it all the same."""


def from_json(value: dict[str, Any], *, where: Path) -> ModelConfig:
    """A `ModelConfig` from the content of a Cohere, Cohere2 or Koine `config.json`; what is left out has `transformers`' default.

    Raises `UserError` for another `model_type`, a missing field or one of the wrong kind, `UnsupportedModelError` for a feature that
    these maths do not have.
    """
    kind = value.get("model_type")
    if kind not in OWN_TYPES:
        raise UserError(
            f"model_type '{kind}' is not one that Koine's own decoder implements ({', '.join(OWN_TYPES)})",
            where=where,
            mend="steps that take any causal LM open it through transformers (pip install 'koine[hf]')",
        )
    rope = value.get("rope_parameters") or value.get("rope_scaling") or {}
    _refuse_unsupported(value, rope, where)
    fields = _Fields(value, where)
    heads, hidden = fields.whole("num_attention_heads"), fields.whole("hidden_size")
    theta = rope.get("rope_theta") or value.get("rope_theta")
    return ModelConfig(
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=fields.whole("head_dim", max(1, hidden // max(1, heads))),
        layers=_layers(fields, kind, fields.whole("num_hidden_layers")),
        mixture=_mixture(fields) if kind == "koine" else None,
        rope_theta=float(theta or (500_000.0 if kind == "cohere" else 10_000.0)),
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        logit_scale=fields.number("logit_scale", 0.0625),
        tie_embeddings=bool(value.get("tie_word_embeddings", True)),
        initializer_range=fields.number("initializer_range", 0.02),
        max_position_embeddings=fields.whole("max_position_embeddings", 8192),
        pad_token_id=fields.identifier("pad_token_id", 0),
        bos_token_id=fields.identifier("bos_token_id", 5),
        eos_token_id=fields.identifier("eos_token_id", 255_001),
    )


def _refuse_unsupported(value: dict[str, Any], rope: dict[str, Any], where: Path) -> None:
    found = {
        "attention_bias": (bool(value.get("attention_bias", False)), False),
        "hidden_act": (value.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (
            rope.get("partial_rotary_factor", value.get("partial_rotary_factor", 1.0)),
            1.0,
        ),
    }
    for name, (got, only) in found.items():
        if got != only:
            raise UnsupportedModelError(
                f"{name} is {got!r}", where=where, mend=f"Koine's own decoder implements {only!r} only"
            )


class _Fields:
    """The fields of a `config.json`, each of its kind; `null` is the same as left out, as in `transformers`."""

    def __init__(self, value: dict[str, Any], where: Path) -> None:
        self.value = value
        self.where = where

    def wrong(self, name: str, kind: str) -> UserError:
        return UserError(
            f"the field '{name}' is {self.value.get(name)!r}", where=self.where, mend=f"it must be {kind}"
        )

    def whole(self, name: str, default: int | None = None) -> int:
        got = self.value.get(name)
        if got is None:
            got = default
        if got is None:
            raise UserError(
                f"the field '{name}' is missing",
                where=self.where,
                mend="the file is not a whole config.json",
            )
        if isinstance(got, bool) or not isinstance(got, int) or got < 1:
            raise self.wrong(name, "a whole number of at least 1")
        return got

    def number(self, name: str, default: float) -> float:
        got = self.value.get(name)
        if got is None:
            return default
        if isinstance(got, bool) or not isinstance(got, int | float):
            raise self.wrong(name, "a number")
        return float(got)

    def identifier(self, name: str, default: int) -> int:
        got = self.value.get(name)
        if isinstance(got, list) and got:
            got = got[0]
        if got is None:
            return default
        if isinstance(got, bool) or not isinstance(got, int):
            raise self.wrong(name, "a token id")
        return got

    def entries(self, name: str, count: int) -> list[Any]:
        got = self.value.get(name)
        if not isinstance(got, list):
            raise self.wrong(name, "a list, one entry a layer")
        if len(got) != count:
            raise UserError(
                f"'{name}' has {len(got)} entries and num_hidden_layers is {count}",
                where=self.where,
                mend="give one entry a layer",
            )
        return got


def _layers(fields: _Fields, kind: str, count: int) -> tuple[LayerSpec, ...]:
    if kind == "koine":
        return tuple(_own_layer(fields, layer) for layer in fields.entries("layers", count))
    if kind == "cohere":
        return (LayerSpec(qk_norm=bool(fields.value.get("use_qk_norm", False))),) * count
    if fields.value.get("layer_types") is None:
        every = fields.whole("sliding_window_pattern", 4)
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    else:
        types = fields.entries("layer_types", count)
    unknown = [name for name in types if name not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UnsupportedModelError(
            f"layer_types holds {unknown[0]!r}",
            where=fields.where,
            mend="Koine's own decoder implements 'sliding_attention' and 'full_attention' only",
        )
    window = fields.whole("sliding_window", 4096)
    return tuple(
        LayerSpec(window=window) if name == "sliding_attention" else LayerSpec(rope=False) for name in types
    )


def _own_layer(fields: _Fields, layer: Any) -> LayerSpec:
    known = {field.name for field in dataclasses.fields(LayerSpec)}
    if not isinstance(layer, dict) or not layer.keys() <= known:
        raise fields.wrong("layers", f"a list of objects with the keys {', '.join(sorted(known))}")
    return LayerSpec(**layer)


def _mixture(fields: _Fields) -> MixtureConfig | None:
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
    return MixtureConfig(**{**value, "experts": tuple(names)})


def read_config(path: Path) -> ModelConfig:
    """The configuration of a model directory."""
    path = Path(path)
    if not path.is_dir():
        raise UserError("no such model directory", where=path, mend="give a folder that holds config.json")
    refuse_adapter(path)
    if not (path / "config.json").exists():
        raise UserError(
            "holds no config.json",
            where=path,
            mend="give the folder of a model, not of a run or a checkpoint",
        )
    value = read_json(path / "config.json")
    if not isinstance(value, dict):
        raise UserError(
            "is not a JSON object", where=path / "config.json", mend="it is no model's configuration"
        )
    return from_json(value, where=path / "config.json")
