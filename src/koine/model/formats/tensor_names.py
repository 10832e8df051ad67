"""A block's tensors in our layout, which is fused, and as saved, one per projection and expert.

The saved names are those of Cohere in `transformers`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from koine.model.config import ModelConfig

SAME_NAMES = {
    "norm.weight": "input_layernorm.weight",
    "router.weight": "mlp.router.weight",
    "router.into": "mlp.router.into",
    "router.out": "mlp.router.out",
    "router.domains": "mlp.router.domains",
    "attention_router.weight": "self_attn.router.weight",
}
"""Tensors that are saved without change."""


def join_stored(name: str, stored: Callable[[str], Tensor], config: ModelConfig) -> Tensor:
    """Build one of our tensors of a block from those of a saved model.

    Args:
        name: our tensor's, without the block's prefix.
        stored: returns a saved tensor by its name without the layer's prefix; raises `KeyError` without one.
        config: of the model.
    """
    if name in SAME_NAMES:
        return stored(SAME_NAMES[name])
    if name in ("q_norm.weight", "k_norm.weight"):
        part = name[0]
        return _gather([stored(f"{place}{name}") for place in _places(part, config)], part, config, dim=0)
    if name == "in_proj.weight":
        parts = [
            _gather(
                [stored(f"{place}{part}_proj.weight") for place in _places(part, config)], part, config, dim=0
            )
            for part in "qkv"
        ]
        if config.dense_size:
            parts += [stored(f"{_dense(config)}{part}_proj.weight") for part in ("gate", "up")]
        return torch.cat(parts, dim=0)
    if name == "out_proj.weight":
        parts = [
            _gather([stored(f"{place}o_proj.weight") for place in _places("q", config)], "q", config, dim=1)
        ]
        if config.dense_size:
            parts.append(stored(f"{_dense(config)}down_proj.weight"))
        return torch.cat(parts, dim=1)
    if name == "experts_in":
        return torch.stack(
            [
                torch.cat([stored(f"{place}{part}_proj.weight") for part in ("gate", "up")], dim=0)
                for place in _feed_forward_places(config)
            ]
        )
    if name == "experts_out":
        return torch.stack([stored(f"{place}down_proj.weight") for place in _feed_forward_places(config)])
    raise KeyError(name)


def split_stored(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Split one of our tensors into the saved ones; the reverse of `join_stored`.

    Returns them by name without the layer's prefix.
    """
    if name in SAME_NAMES:
        return {SAME_NAMES[name]: tensor}
    if name in ("q_norm.weight", "k_norm.weight"):
        part = name[0]
        parts = _scatter(tensor, part, config, dim=0)
        return {f"{place}{name}": one for place, one in zip(_places(part, config), parts, strict=True)}
    out: dict[str, Tensor] = {}
    if name == "in_proj.weight":
        *attention, gate, up = torch.split(tensor, list(config.projection_sizes), dim=0)
        for part, rows in zip("qkv", attention, strict=True):
            for place, one in zip(_places(part, config), _scatter(rows, part, config, dim=0), strict=True):
                out[f"{place}{part}_proj.weight"] = one
        if config.dense_size:
            out[f"{_dense(config)}gate_proj.weight"], out[f"{_dense(config)}up_proj.weight"] = gate, up
        return out
    if name == "out_proj.weight":
        attention_out, down = torch.split(tensor, [config.attention_size, config.dense_size], dim=1)
        parts = _scatter(attention_out, "q", config, dim=1)
        for place, one in zip(_places("q", config), parts, strict=True):
            out[f"{place}o_proj.weight"] = one
        if config.dense_size:
            out[f"{_dense(config)}down_proj.weight"] = down
        return out
    if name == "experts_in":
        for place, one in zip(_feed_forward_places(config), tensor, strict=True):
            out[f"{place}gate_proj.weight"], out[f"{place}up_proj.weight"] = one.chunk(2, dim=0)
        return out
    if name == "experts_out":
        places = _feed_forward_places(config)
        return {f"{place}down_proj.weight": one for place, one in zip(places, tensor, strict=True)}
    raise KeyError(name)


def _places(part: str, config: ModelConfig) -> list[str]:
    """Return the prefixes of the saved projections of q (and output), k or v.

    One, or one per attention expert.
    """
    copies = config.query_copies if part == "q" else config.kv_copies
    if config.mixture is None or config.mixture.attention == "averaged" or (part != "q" and copies == 1):
        return ["self_attn."]
    return [f"self_attn.experts.{index}." for index in range(copies)]


def _dense(config: ModelConfig) -> str:
    return "mlp." if config.mixture is None else "mlp.shared_expert."


def _feed_forward_places(config: ModelConfig) -> list[str]:
    assert config.mixture is not None
    return [f"mlp.experts.{index}." for index in range(len(config.mixture.experts))]


def _interleaved(part: str, config: ModelConfig) -> bool:
    """Return whether the experts' heads are adjacent under each key head that they share."""
    return part == "q" and config.query_copies > config.kv_copies


def _gather(parts: list[Tensor], part: str, config: ModelConfig, *, dim: int) -> Tensor:
    """Concatenate the heads of all experts along `dim`."""
    if not _interleaved(part, config):
        return torch.cat(parts, dim=dim)
    by_key_head = [torch.unflatten(one, dim, (config.kv_heads, -1)) for one in parts]
    return torch.stack(by_key_head, dim=dim + 1).flatten(dim, dim + 2)


def _scatter(tensor: Tensor, part: str, config: ModelConfig, *, dim: int) -> list[Tensor]:
    """Split the heads of all experts; the reverse of `_gather`."""
    copies = config.query_copies if part == "q" else config.kv_copies
    if not _interleaved(part, config):
        return list(tensor.chunk(copies, dim=dim))
    by_key_head = torch.unflatten(tensor, dim, (config.kv_heads, copies, -1))
    return [one.flatten(dim, dim + 1) for one in by_key_head.unbind(dim + 1)]
