"""`config.json` in both directions: Cohere and Cohere2 where the model is one of them, our own `koine` where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from koine.errors import UserError
from koine.files import read_json
from koine.model.config import LayerSpec, ModelConfig

OWN_TYPES = ("cohere", "cohere2", "koine")
_ARCHITECTURE = {"cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM", "koine": "KoineForCausalLM"}


def model_type(config: ModelConfig) -> str:
    """The `transformers` class that is exactly this model, or `koine` where there is none.

    Cohere: every layer full with RoPE. Cohere2: windowed layers (one window) with RoPE, full ones without, no QK-norm.
    """
    layers = config.layers
    if all(layer.window is None and layer.rope and layer.qk_norm == layers[0].qk_norm for layer in layers):
        # transformers' Cohere takes head_dim from its config where given, and derives it otherwise.
        return "cohere"
    windows = {layer.window for layer in layers if layer.window is not None}
    hybrid = all((layer.window is not None) == layer.rope and not layer.qk_norm for layer in layers)
    return "cohere2" if hybrid and len(windows) == 1 else "koine"


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
        value["sliding_window"] = next(layer.window for layer in config.layers if layer.window is not None)
        value["layer_types"] = [
            "full_attention" if layer.window is None else "sliding_attention" for layer in config.layers
        ]
    else:
        value["layers"] = [
            {"window": layer.window, "rope": layer.rope, "qk_norm": layer.qk_norm} for layer in config.layers
        ]
    return value


def from_json(value: dict[str, Any], *, where: Path) -> ModelConfig:
    """A `ModelConfig` from the content of a Cohere, Cohere2 or Koine `config.json`.

    Raises `UserError` for another `model_type`, a missing field, or a feature that these maths do not have.
    """
    kind = value.get("model_type")
    if kind not in OWN_TYPES:
        raise UserError(
            f"model_type '{kind}' is not one that Koine's own decoder implements ({', '.join(OWN_TYPES)})",
            where=where,
            mend="steps that take any causal LM open it through transformers (pip install 'koine[hf]')",
        )
    if value.get("attention_bias"):
        raise UserError("attention_bias is true", where=where, mend="Koine's decoder has no biases")
    rope = value.get("rope_parameters") or value.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(
            f"rope_type '{rope.get('rope_type', rope.get('type'))}' is not implemented",
            where=where,
            mend="only 'default' is",
        )
    try:
        heads, hidden, count = value["num_attention_heads"], value["hidden_size"], value["num_hidden_layers"]
        return ModelConfig(
            vocab_size=value["vocab_size"],
            hidden_size=hidden,
            intermediate_size=value["intermediate_size"],
            num_heads=heads,
            num_kv_heads=value.get("num_key_value_heads") or heads,
            head_dim=value.get("head_dim") or hidden // heads,
            layers=_layers(value, kind, count),
            rope_theta=float(rope.get("rope_theta") or value.get("rope_theta") or 10_000.0),
            norm_eps=value.get("layer_norm_eps", 1e-5),
            logit_scale=value.get("logit_scale", 0.0625),
            tie_embeddings=value.get("tie_word_embeddings", True),
            initializer_range=value.get("initializer_range", 0.02),
            max_position_embeddings=value.get("max_position_embeddings", 8192),
            pad_token_id=value.get("pad_token_id") or 0,
            bos_token_id=value.get("bos_token_id", 5),
            eos_token_id=_first(value.get("eos_token_id", 255_001)),
        )
    except KeyError as error:
        raise UserError(
            f"the field {error} is missing", where=where, mend="the file is not a whole config.json"
        ) from None


def _first(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value


def _layers(value: dict[str, Any], kind: str, count: int) -> tuple[LayerSpec, ...]:
    if kind == "koine":
        return tuple(LayerSpec(**layer) for layer in value["layers"])
    if kind == "cohere":
        return (LayerSpec(qk_norm=bool(value.get("use_qk_norm", False))),) * count
    types = value.get("layer_types")
    if types is None:
        every = value.get("sliding_window_pattern") or 4
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(count)]
    window = value.get("sliding_window", 4096)
    return tuple(
        LayerSpec(window=window) if name == "sliding_attention" else LayerSpec(rope=False) for name in types
    )


def read_config(path: Path) -> ModelConfig:
    """The configuration of a model directory."""
    path = Path(path)
    if not path.is_dir():
        raise UserError("no such model directory", where=path, mend="give a folder that holds config.json")
    if not (path / "config.json").exists():
        raise UserError(
            "holds no config.json",
            where=path,
            mend="give the folder of a model, not of a run or a checkpoint",
        )
    return from_json(read_json(path / "config.json"), where=path / "config.json")
