"""Read and write the fields that most families share. Missing fields have the class's default."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from koine.errors import UserError
from koine.fields import Fields, short_repr
from koine.model.config import (
    LONGEST_WINDOW,
    MOST_LAYERS,
    SIZES,
    TOKEN_ID,
    Activation,
    LayerSpec,
    ModelConfig,
    RopeScaling,
)

NO_TOKEN = -1
"""Our token id for none, in a `config.json` null."""
ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu",
    "relu": "relu",
}  # fmt: skip
_NAME_OF_ACTIVATION = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu"}
SCALINGS = ("default", "linear", "dynamic", "llama3", "yarn")
_SCALING_FIELDS = (
    "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "beta_fast",
    "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


class UnsupportedModelError(UserError):
    """A model of a known family with a feature that our decoder lacks and `transformers` has."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The defaults of a class of `transformers`, for fields that a `config.json` leaves out."""

    context: int
    kv_heads: int | None = None
    """None: as many as query heads."""
    head_dim: int | None = None
    """None: `hidden_size / num_attention_heads`."""
    theta: float = 10_000.0
    eps: float = 1e-6
    eps_name: str = "rms_norm_eps"
    activation_name: str = "hidden_act"
    activation: str = "silu"
    tied: bool = False
    initializer_range: float = 0.02
    pad: int | None = None
    bos: int | None = 1
    eos: int | None = 2


def unsupported(fields: Fields, name: str, value: Any, only: str) -> UnsupportedModelError:
    """Return the error for a field whose value our decoder does not compute."""
    return UnsupportedModelError(
        f"{name} is {short_repr(value)}",
        where=fields.where,
        hint=f"Koine's own decoder implements {only} only",
    )


def read_common(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """Return the arguments of `ModelConfig` that most families have: `read_sizes`, and one RoPE for all layers."""
    sizes = read_sizes(fields, defaults)
    context = sizes["max_position_embeddings"]
    return sizes | read_rope(fields, rope_fields(fields), defaults.theta, sizes["head_dim"], context)


def read_sizes(fields: Fields, defaults: Defaults) -> dict[str, Any]:
    """Return the arguments of `ModelConfig` that every family has."""
    heads, hidden = _size(fields, "num_attention_heads", "num_heads"), _size(fields, "hidden_size")
    head_dim = _size(fields, "head_dim", "head_dim", defaults.head_dim or max(1, hidden // heads))
    keep(fields, "head_dim")
    name = defaults.activation_name
    activation = fields.text(name, defaults.activation)
    if activation not in ACTIVATIONS:
        raise unsupported(fields, name, activation, ", ".join(ACTIVATIONS))
    return {
        "vocab_size": _size(fields, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _size(fields, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": _size(fields, "num_key_value_heads", "num_kv_heads", defaults.kv_heads or heads),
        "head_dim": head_dim,
        "activation": ACTIVATIONS[activation],
        "norm_eps": fields.number(defaults.eps_name, defaults.eps),
        "tie_embeddings": fields.boolean("tie_word_embeddings", defaults.tied),
        "initializer_range": fields.number("initializer_range", defaults.initializer_range),
        "max_position_embeddings": _size(
            fields, "max_position_embeddings", "max_position_embeddings", defaults.context
        ),
        "pad_token_id": token_id(fields, "pad_token_id", defaults.pad),
        "bos_token_id": token_id(fields, "bos_token_id", defaults.bos),
        "eos_token_id": token_id(fields, "eos_token_id", defaults.eos),
    }


def write_common(config: ModelConfig, defaults: Defaults) -> dict[str, Any]:
    """Return the fields of `read_common`."""
    return write_sizes(config, defaults) | {"rope_parameters": write_rope(config)}


def write_sizes(config: ModelConfig, defaults: Defaults) -> dict[str, Any]:
    """Return the fields of `read_sizes`."""
    eos: Any = null_or(config.eos_token_id)
    carried = dict(config.carried).get("eos_token_id")
    if carried is not None and json.loads(carried)[:1] == [eos]:
        eos = json.loads(carried)
    own_head_dim = defaults.head_dim is not None or config.head_dim != config.hidden_size // config.num_heads
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        **({"head_dim": config.head_dim} if own_head_dim else {}),
        defaults.activation_name: _NAME_OF_ACTIVATION[config.activation],
        defaults.eps_name: config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "pad_token_id": null_or(config.pad_token_id),
        "bos_token_id": null_or(config.bos_token_id),
        "eos_token_id": eos,
    }


def _size(fields: Fields, name: str, ours: str | None = None, *default: int) -> int:
    """Read a size, by its name in the file and our name."""
    got: int = fields.integer(name, *default, low=1, high=SIZES[ours or name])
    return got


def layer_count(fields: Fields) -> int:
    """Return the number of layers."""
    got: int = fields.integer("num_hidden_layers", low=1, high=MOST_LAYERS)
    return got


def token_id(fields: Fields, name: str, default: int | None) -> int:
    """Return a token id, or the first of several; `NO_TOKEN` for none."""
    # Null is none here, where the file says so: it stands for no default.
    got = fields.get(name, None) if name in fields.value else default
    if got is None:
        return NO_TOKEN
    if isinstance(got, list) and got:
        got = got[0]
    if isinstance(got, bool) or not isinstance(got, int) or not TOKEN_ID[0] <= got <= TOKEN_ID[1]:
        raise fields.wrong(name, "a token id")
    return got


def null_or(token: int) -> int | None:
    """Return a token id as a `config.json` has it."""
    return None if token == NO_TOKEN else token


def one_a_layer(fields: Fields, name: str, count: int) -> list[Any]:
    """Return a list with an entry for each layer."""
    got: list[Any] = fields.entries(name)
    if len(got) != count:
        raise UserError(
            f"'{name}' has {len(got)} entries and num_hidden_layers is {count}",
            where=fields.where,
            hint="give one entry per layer",
        )
    return got


# -- RoPE ----------------------------------------------------------------------------------------------------


def rope_fields(fields: Fields) -> Fields:
    """Return the fields about RoPE: `rope_parameters`, or the older `rope_scaling`; empty without them."""
    found = fields.inner("rope_scaling", None) or fields.inner("rope_parameters", None)
    return found or Fields({}, fields.where)


def read_rope(fields: Fields, rope: Fields, theta: float, head_dim: int, context: int) -> dict[str, Any]:
    """Return `rope_theta`, `rope_scaling` and `rotary_dim` of `ModelConfig`.

    Args:
        fields: the file's, which has some of them at its top in older files.
        rope: see `rope_fields`.
        theta: the class's default.
        head_dim: of the model.
        context: `max_position_embeddings`.
    """
    top_theta = fields.number("rope_theta", None)
    base = rope.number("rope_theta", theta if top_theta is None else top_theta)
    top_share = fields.number("partial_rotary_factor", None)
    share = rope.number("partial_rotary_factor", 1.0 if top_share is None else top_share)
    rotary = int(head_dim * share)
    return {
        "rope_theta": base,
        "rope_scaling": read_scaling(
            rope, context, fields.integer("original_max_position_embeddings", None, low=1)
        ),
        "rotary_dim": None if rotary == head_dim else rotary,
    }


def read_scaling(rope: Fields, context: int, original: int | None = None) -> RopeScaling | None:
    """Return the scaling of RoPE; None for `default`. Raises `UnsupportedModelError` for other kinds.

    Args:
        rope: see `rope_fields`.
        context: `max_position_embeddings`.
        original: `original_max_position_embeddings` at the top of the file, which goes first.
    """
    kind = rope.text("rope_type", None) or rope.text("type", "default")
    if kind not in SCALINGS:
        raise unsupported(rope, "rope_type", kind, ", ".join(SCALINGS))
    known = {*_SCALING_FIELDS, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    unknown = sorted(name for name, value in rope.value.items() if name not in known and value is not None)
    if unknown:
        raise unsupported(
            rope, f"rope_parameters.{unknown[0]}", rope.value[unknown[0]], ", ".join(sorted(known))
        )
    if kind == "default":
        return None
    given = {name: rope.value[name] for name in _SCALING_FIELDS if rope.value.get(name) is not None}
    if original is not None and kind in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = original
    if kind == "yarn" and "factor" not in given:
        given["factor"] = context / given.get("original_max_position_embeddings", context)
    if "factor" not in given:
        raise UserError(
            "the field 'factor' of the RoPE scaling is missing", where=rope.where, hint=rope.hint_if_broken
        )
    return RopeScaling(kind=kind, **given)


def write_rope(config: ModelConfig, theta: float | None = None) -> dict[str, Any]:
    """Return `rope_parameters`; with `theta` those of a layer that has a base of its own and no scaling."""
    scaling = config.rope_scaling if theta is None else None
    base = config.rope_theta if theta is None else theta
    value: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default", "rope_theta": base}
    if scaling is not None:
        plain = RopeScaling(kind=scaling.kind, factor=scaling.factor)
        needed = {"factor"}
        if scaling.kind == "llama3":
            needed |= {"low_freq_factor", "high_freq_factor"}
        for name in _SCALING_FIELDS:
            got = getattr(scaling, name)
            if name in needed or got != getattr(plain, name):
                value[name] = got
    if config.rotary_dim is not None:
        value["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    return value


# -- layers --------------------------------------------------------------------------------------------------

WINDOWED, FULL = "sliding_attention", "full_attention"


def read_layer_types(fields: Fields, count: int, default: Sequence[str]) -> list[str]:
    """Return the kind of each layer, `sliding_attention` or `full_attention`.

    Raises `UnsupportedModelError` for others.
    """
    types = list(default)
    if fields.get("layer_types", None) is not None:
        types = one_a_layer(fields, "layer_types", count)
    unknown = [name for name in types if name not in (WINDOWED, FULL)]
    if unknown:
        raise unsupported(fields, "an entry of layer_types", unknown[0], f"'{WINDOWED}' and '{FULL}'")
    return types


def read_window(fields: Fields, default: int | None = None) -> int | None:
    """Return the window of the layers that have one."""
    got: int | None = fields.integer("sliding_window", default, low=1, high=LONGEST_WINDOW)
    return got


def window_of(config: ModelConfig) -> int | None:
    """Return the window of the windowed layers, the first where they differ; None without any."""
    return next((layer.window for layer in config.layers if layer.window is not None), None)


def layer_types_of(config: ModelConfig) -> list[str]:
    """Return the kind of each layer."""
    return [FULL if layer.window is None else WINDOWED for layer in config.layers]


def keep(fields: Fields, *names: str) -> None:
    """Let fields that were read be written again as they stand: what is written otherwise says the same."""
    fields.names_read.difference_update(names)


def is_set(fields: Fields, name: str, expected: Any, hint: str) -> None:
    """Raise `UnsupportedModelError` where a field is not what our decoder computes; null is the same."""
    got = fields.get(name, None)
    if got is not None and got != expected:
        raise unsupported(fields, name, got, hint)


def same_layers(count: int, spec: LayerSpec) -> tuple[LayerSpec, ...]:
    """Return `count` equal layers."""
    return (spec,) * count


def whole(value: float) -> float | int:
    """Undo the rounding of an inverse: the nearest number of few digits, as an integer where it is one."""
    rounded = round(value, 9)
    return int(rounded) if rounded == int(rounded) else rounded
