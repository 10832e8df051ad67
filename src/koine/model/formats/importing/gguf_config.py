"""Build `config.json` and `generation_config.json` from a GGUF file's metadata.

Metadata of the architecture that are not known here are refused by name: they may change what the model
computes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from koine.errors import UserError
from koine.fields import short_repr
from koine.model.formats.importing.architectures import ARCHITECTURES, MIXTRAL, Architecture
from koine.model.formats.importing.gguf_file import GgufFile, StoredTensor
from koine.model.formats.importing.metadata import Metadata

DEFAULT_THETA: Final = 10_000.0
"""Base of the rotary frequencies where the file names none, as in llama.cpp."""
MOST_BLOCKS: Final = 10_000
_HARMLESS: Final = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "embedding_length_out")
_LLAMA3_SCALING: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_LENGTH: Final = 8192
_LARGE_GEMMA: Final = {"gemma2": 46, "gemma3": 62}
"""Blocks of the 27B models, whose attention is scaled by hidden size and heads instead of the head size."""
_GEMMA3_LOCAL_THETA: Final = 10_000.0
_SIZES: Final = ("_size", "_heads", "_layers", "_dim", "experts", "_window", "_embeddings", "_per_tok")
"""Endings of the fields of `config.json` that are sizes."""


@dataclass(frozen=True)
class GgufConfig:
    """The model as the metadata describe it.

    Attributes:
        architecture: the entry of the table.
        name: of llama.cpp.
        content: of `config.json`, without dtype.
        sizes: by the letters of `architectures`.
        blocks: number of blocks.
        extra_tensors: tensors that are in the configuration and not in the weights.
    """

    architecture: Architecture
    name: str
    content: dict[str, Any]
    sizes: dict[str, int]
    blocks: int
    extra_tensors: tuple[str, ...]


def read_gguf_config(file: GgufFile) -> GgufConfig:
    """Read the configuration. Raises `UserError` for what is not known or does not fit together."""
    metadata = Metadata(file.metadata, file.where)
    name, architecture = _architecture(metadata)
    content = _fields(metadata, name, architecture)
    sizes = _sizes(content, architecture, file)
    extra = _rope(content, metadata, name, file, sizes)
    _of_family(content, metadata, name, sizes)
    _check_experts(metadata, name, architecture)
    for key in (*_HARMLESS, *architecture.ignored):
        metadata.get(f"{name}.{key}", (str, int, float, bool))
    unread = metadata.unread(f"{name}.")
    if unread:
        raise UserError(
            f"has the metadata '{unread[0]}', which may change what the model computes and is not known here",
            where=file.where,
            hint="give a file of a plain model of this architecture, or the model's own checkpoint",
        )
    blocks = content["num_hidden_layers"]
    content = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        **content,
        **architecture.constants,
        "use_cache": True,
    }
    return GgufConfig(architecture, name, content, sizes, blocks, extra)


def _architecture(metadata: Metadata) -> tuple[str, Architecture]:
    name = metadata.text("general.architecture")
    kind = metadata.text("general.type", "model")
    if kind != "model":
        raise UserError(
            f"is a GGUF file of the type '{kind}', no model", where=metadata.where, hint="give a model's file"
        )
    if name is None:
        raise UserError(
            "names no 'general.architecture'", where=metadata.where, hint="the file is damaged or no model"
        )
    if name not in ARCHITECTURES:
        raise UserError(
            f"is of the architecture {short_repr(name)}",
            where=metadata.where,
            hint=f"these are imported: {', '.join(ARCHITECTURES)}",
        )
    if name == "llama" and metadata.size("llama.expert_count", 0):
        return name, MIXTRAL
    return name, ARCHITECTURES[name]


def _fields(metadata: Metadata, name: str, architecture: Architecture) -> dict[str, Any]:
    """Return the fields that the table names, in its order."""
    content: dict[str, Any] = {}
    for key, field in architecture.fields.items():
        value = metadata.number(f"{name}.{key}", architecture.defaults.get(key))
        if value is not None:
            content[field] = value
    heads, hidden = content.get("num_attention_heads"), content.get("hidden_size")
    content.setdefault("num_key_value_heads", heads)
    if heads and hidden:
        content.setdefault("head_dim", hidden // heads)
    if architecture.model_type == "granite":
        # Without a scale of its own, attention is scaled as everywhere else, which the class does not do.
        content.setdefault("attention_multiplier", 0)
    for key, field in architecture.fields.items():
        if field not in content and field not in architecture.optional:
            raise UserError(
                f"lacks the metadata '{name}.{key}'", where=metadata.where, hint="the file is damaged"
            )
    for field in content:
        if field.endswith(_SIZES):
            _check_size(metadata, name, architecture, field, content[field])
    if content.get("attention_multiplier") == 0:
        content["attention_multiplier"] = 1 / math.sqrt(content["head_dim"])
    if content["num_hidden_layers"] > MOST_BLOCKS:
        raise UserError(
            f"names {content['num_hidden_layers']:,} blocks", where=metadata.where, hint="the file is damaged"
        )
    value_length = metadata.size(f"{name}.attention.value_length", content["head_dim"])
    if value_length != content["head_dim"]:
        raise UserError(
            f"has keys of {content['head_dim']} and values of {value_length} per head",
            where=metadata.where,
            hint="models with one size for both are imported",
        )
    if not metadata.get(f"{name}.attention.causal", bool, True):
        raise UserError("is no causal model", where=metadata.where, hint="give a model that writes text")
    return content


def _check_size(metadata: Metadata, name: str, architecture: Architecture, field: str, value: Any) -> None:
    key = next((key for key, known in architecture.fields.items() if known == field), field)
    if not isinstance(value, int) or not 1 <= value < 2**31:
        raise UserError(
            f"the metadata '{name}.{key}' is {short_repr(value)}, no size from 1 on",
            where=metadata.where,
            hint="the file is damaged",
        )


def _sizes(content: dict[str, Any], architecture: Architecture, file: GgufFile) -> dict[str, int]:
    """Return the sizes that shapes are written in; adds the vocabulary to `content`."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(
            "has no matrix 'token_embd.weight'", where=file.where, hint="the file is damaged or no model"
        )
    heads, groups, head = (
        content[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    if heads % groups:
        raise UserError(
            f"has {heads} heads and {groups} key-value heads", where=file.where, hint="the file is damaged"
        )
    content["vocab_size"] = embedding.shape[0]
    feed_forward = content.get("intermediate_size", 0)
    experts = content.get("num_experts", content.get("num_local_experts", 0))
    if experts and content["num_experts_per_tok"] > experts:
        raise UserError(
            f"chooses {content['num_experts_per_tok']} of {experts} experts",
            where=file.where,
            hint="the file is damaged",
        )
    return {
        "v": embedding.shape[0],
        "h": content["hidden_size"],
        "f": feed_forward,
        "q": heads * head,
        "k": groups * head,
        "d": head,
        "n": heads,
        "m": groups,
        "e": experts,
        "x": content.get("moe_intermediate_size", feed_forward),
        "s": content.get("shared_expert_intermediate_size", 0),
        "p": (heads + 2 * groups) * head,
        "g": 2 * feed_forward,
        "1": 1,
    }


# --- rotary positions ---


def _rope(
    content: dict[str, Any], metadata: Metadata, name: str, file: GgufFile, sizes: Mapping[str, int]
) -> tuple[str, ...]:
    """Add `rope_parameters` to `content`; return the tensors that are read into them."""
    theta = float(metadata.number(f"{name}.rope.freq_base", DEFAULT_THETA))
    if theta <= 0:
        raise UserError(f"'{name}.rope.freq_base' is {theta}", where=file.where, hint="the file is damaged")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = metadata.size(f"{name}.rope.dimension_count", sizes["d"])
    if rotated != sizes["d"]:
        if name != "phi3" or rotated > sizes["d"] or rotated % 2:
            raise UserError(
                f"rotates {rotated} of the {sizes['d']} dimensions of a head",
                where=file.where,
                hint=f"of '{name}' only models that rotate all of them are imported",
            )
        rope["partial_rotary_factor"] = rotated / sizes["d"]
    kind = metadata.text(f"{name}.rope.scaling.type", "none")
    factor = metadata.number(f"{name}.rope.scaling.factor", None)
    linear = metadata.number(f"{name}.rope.scale_linear", None)
    if linear is not None and kind == "none":
        kind, factor = "linear", linear
    used: tuple[str, ...] = ()
    if name == "phi3":
        content["original_max_position_embeddings"] = metadata.size(
            f"{name}.rope.scaling.original_context_length", content["max_position_embeddings"]
        )
    if name == "phi3" and "rope_factors_long.weight" in file.tensors:
        used = _longrope(rope, content, metadata, name, file, rotated)
    elif kind == "yarn":
        _yarn(rope, metadata, name, factor)
    elif kind == "linear":
        if factor not in (None, 1, 0):
            rope |= {"rope_type": "linear", "factor": float(factor)}
    elif kind != "none":
        raise UserError(
            f"has the rotary scaling {short_repr(kind)}",
            where=file.where,
            hint="these are imported: none, linear, yarn, Llama 3's, and longrope of phi3",
        )
    if "rope_freqs.weight" in file.tensors:
        used = ("rope_freqs.weight",)
        _llama3(rope, content, file, theta, rotated)
    content["rope_parameters"] = rope
    return used


def _vector(file: GgufFile, name: str, length: int) -> np.ndarray[Any, Any]:
    """Read a tensor of factors as float64."""
    tensor: StoredTensor = file.tensors[name]
    if tensor.shape != (length,) or tensor.kind.name != "F32":
        raise UserError(
            f"{name} is {tensor.kind.name} of shape {list(tensor.shape)}, not F32 of [{length}]",
            where=file.where,
            hint="the file is damaged",
        )
    values = tensor.kind.values(file.read(tensor, 0, 1))[0].to(torch.float64).numpy()
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise UserError(
            f"{name} holds a factor that is not positive", where=file.where, hint="the file is damaged"
        )
    return values


def _longrope(
    rope: dict[str, Any], content: dict[str, Any], metadata: Metadata, name: str, file: GgufFile, rotated: int
) -> tuple[str, ...]:
    tensors = ("rope_factors_long.weight", "rope_factors_short.weight")
    if tensors[1] not in file.tensors:
        raise UserError(f"lacks the tensor {tensors[1]}", where=file.where, hint="the file is damaged")
    long, short = (
        [float(str(np.float32(value))) for value in _vector(file, tensor, rotated // 2)] for tensor in tensors
    )
    rope |= {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": content["original_max_position_embeddings"],
    }
    attention = metadata.number(f"{name}.rope.scaling.attn_factor", None)
    if attention is not None:
        rope["attention_factor"] = float(attention)
    return tensors


def _yarn(rope: dict[str, Any], metadata: Metadata, name: str, factor: float | None) -> None:
    original = metadata.size(f"{name}.rope.scaling.original_context_length", None)
    if not factor or not original:
        raise UserError(
            f"has the rotary scaling yarn without '{name}.rope.scaling.factor' and 'original_context_length'",
            where=metadata.where,
            hint="the file is damaged",
        )
    rope |= {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": original,
        "beta_fast": float(metadata.number(f"{name}.rope.scaling.yarn_beta_fast", 32.0)),
        "beta_slow": float(metadata.number(f"{name}.rope.scaling.yarn_beta_slow", 1.0)),
    }
    # Both multiply the factor that the two libraries derive in the same way.
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        value = metadata.number(f"{name}.rope.scaling.{key}", 1.0)
        if value != 1.0:
            raise UserError(
                f"the metadata '{name}.rope.scaling.{key}' is {value}",
                where=metadata.where,
                hint="yarn is imported with the factors of its paper only",
            )


def llama3_factors(theta: float, rotated: int, factor: float, original: int) -> np.ndarray[Any, Any]:
    """Return the divisors of the rotary frequencies in Llama 3's scaling, [rotated / 2].

    Source: Llama 3.1's reference code; `transformers` computes the same as `rope_type: llama3`.
    """
    low, high = _LLAMA3_SCALING["low_freq_factor"], _LLAMA3_SCALING["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(
        wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, between)
    )


def _llama3(
    rope: dict[str, Any], content: dict[str, Any], file: GgufFile, theta: float, rotated: int
) -> None:
    """Find the scaling whose factors `rope_freqs.weight` holds: none, or Llama 3's."""
    found = _vector(file, "rope_freqs.weight", rotated // 2)
    if np.allclose(found, 1.0):
        return
    factor = float(found.max())
    if rope["rope_type"] == "default" and np.allclose(
        found, llama3_factors(theta, rotated, factor, _LLAMA3_LENGTH), rtol=1e-4
    ):
        rope |= {
            "rope_type": "llama3",
            "factor": factor,
            **_LLAMA3_SCALING,
            "original_max_position_embeddings": _LLAMA3_LENGTH,
        }
        return
    raise UserError(
        "rope_freqs.weight holds rotary factors that are not those of Llama 3's scaling",
        where=file.where,
        hint="import the model's own checkpoint",
    )


# --- what differs between families ---


def _of_family(content: dict[str, Any], metadata: Metadata, name: str, sizes: Mapping[str, int]) -> None:
    """Add what a family's class needs and its metadata do not name, as llama.cpp fixes it for the family."""
    count = content["num_hidden_layers"]
    if name in ("gemma2", "gemma3"):
        large = count == _LARGE_GEMMA[name]
        content["query_pre_attn_scalar"] = sizes["h"] // sizes["n"] if large else sizes["d"]
    if name == "gemma2":
        content["layer_types"] = _layer_types(metadata, name, count, every=2)
    if name == "gemma3":
        content["layer_types"] = _layer_types(metadata, name, count, every=6)
        local = float(metadata.number(f"{name}.rope.freq_base_swa", _GEMMA3_LOCAL_THETA))
        content["rope_parameters"] = {
            "full_attention": content["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    if name == "cohere2":
        content["layer_types"] = _layer_types(metadata, name, count, every=4)
    if name == "smollm3":
        # Every fourth block has no positions; llama.cpp knows that without a word in the file.
        content["no_rope_layers"] = [int((index + 1) % 4 != 0) for index in range(count)]


def _layer_types(metadata: Metadata, name: str, count: int, *, every: int) -> list[str]:
    """Return which layers have a window: as the file says, else all but every `every`-th."""
    key = f"{name}.attention.sliding_window_pattern"
    pattern = metadata.values.get(key)
    if isinstance(pattern, np.ndarray):
        windowed = [bool(value) for value in metadata.numbers(key)]
        if len(windowed) != count:
            raise UserError(
                f"the metadata '{key}' has {len(windowed)} entries for {count} blocks",
                where=metadata.where,
                hint="the file is damaged",
            )
    else:
        every = metadata.size(key, every)
        windowed = [every > 0 and (index + 1) % every != 0 for index in range(count)]
    return ["sliding_attention" if one else "full_attention" for one in windowed]


def _check_experts(metadata: Metadata, name: str, architecture: Architecture) -> None:
    """Raise `UserError` for a routing of experts that the class does not compute."""
    expected: dict[str, Any] = {"expert_gating_func": 1, "expert_weights_scale": 1.0}
    if "norm_topk_prob" in architecture.constants:
        expected["expert_weights_norm"] = architecture.constants["norm_topk_prob"]
    if "expert_count" not in architecture.fields:
        expected = {"expert_count": 0, "expert_used_count": 0}
    for key, wanted in expected.items():
        value = metadata.get(f"{name}.{key}", (int, float, bool), wanted)
        if value != wanted:
            raise UserError(
                f"the metadata '{name}.{key}' is {value}",
                where=metadata.where,
                hint=f"'{name}' is imported with {wanted} only",
            )
