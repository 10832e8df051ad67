"""A block's tensors in our layout, which is fused, and as a folder of ours stores them, one per projection.

The stored ("canonical") names are `self_attn.q_proj.weight`, `mlp.experts.2.up_proj.weight` and so on. What
other classes call them: `koine.model.families`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from koine.model.config import LayerSpec, ModelConfig

SAME_NAMES = {
    "norm.weight": "input_layernorm.weight",
    "norm.bias": "input_layernorm.bias",
    **{
        f"{norm}.{kind}": f"{norm}.{kind}"
        for norm in ("attention_norm", "attention_out_norm", "feed_forward_norm", "feed_forward_out_norm")
        for kind in ("weight", "bias")
    },
    "out_proj.bias": "self_attn.o_proj.bias",
    "o_proj.bias": "self_attn.o_proj.bias",
    "shared_gate.weight": "mlp.shared_expert_gate.weight",
    "experts.router.weight": "mlp.router.weight",
    "experts.router.into": "mlp.router.into",
    "experts.router.out": "mlp.router.out",
    "experts.router.domains": "mlp.router.domains",
    "attention_experts.router.weight": "self_attn.router.weight",
}
"""Tensors that are stored without change."""

FUSED = {
    "in_proj.weight": ("q", "k", "v", "gate", "up"),
    "qkv_bias": ("q", "k", "v"),
    "qkv_proj.weight": ("q", "k", "v"),
    "qkv_proj.bias": ("q", "k", "v"),
    "gate_up_proj.weight": ("gate", "up"),
    "gate_up_proj.bias": ("gate", "up"),
    "out_proj.weight": ("o", "down"),
    "o_proj.weight": ("o",),
    "down_proj.weight": ("down",),
    "down_proj.bias": ("down",),
}
"""The projections that each of our tensors is made of, along its rows, or its columns for `OUTPUTS`."""
OUTPUTS = ("out_proj.weight", "o_proj.weight", "down_proj.weight")


def join_stored(name: str, stored: Callable[[str], Tensor], config: ModelConfig, spec: LayerSpec) -> Tensor:
    """Build one of our tensors of a block from those of a stored model.

    Args:
        name: our tensor's, without the block's prefix.
        stored: returns a stored tensor by its name without the layer's prefix; raises `KeyError` without one.
        config: of the model.
        spec: of the layer.
    """
    if name in SAME_NAMES:
        return stored(SAME_NAMES[name])
    if name in ("q_norm.weight", "k_norm.weight"):
        part = name[0]
        parts = [stored(f"{place}{name}") for place in _places(part, config)]
        if spec.qk_norm == "head":
            return parts[0] if len(parts) == 1 else torch.stack(parts)
        if spec.qk_norm == "full":
            parts = [torch.unflatten(one, 0, (-1, config.head_dim)) for one in parts]
        return _gather(parts, part, config, dim=0)
    if name in FUSED:
        dim, kind = int(name in OUTPUTS), _kind(name)
        return torch.cat(
            [
                _gather(
                    [stored(f"{place}{part}_proj.{kind}") for place in _places(part, config)],
                    part,
                    config,
                    dim=dim,
                )
                for part, size in _segments(name, config)
                if size
            ],
            dim=dim,
        )
    if name == "attention_experts.out_bias":
        return torch.stack([stored(f"{place}o_proj.bias") for place in _places("o", config)])
    if name == "experts.experts_in":
        return torch.stack(
            [
                torch.cat([stored(f"{place}{part}_proj.weight") for part in ("gate", "up")], dim=0)
                for place in _feed_forward_places(config)
            ]
        )
    if name == "experts.experts_out":
        return torch.stack([stored(f"{place}down_proj.weight") for place in _feed_forward_places(config)])
    raise KeyError(name)


def split_stored(name: str, tensor: Tensor, config: ModelConfig, spec: LayerSpec) -> dict[str, Tensor]:
    """Split one of our tensors into the stored ones; the reverse of `join_stored`.

    Returns them by name without the layer's prefix.
    """
    if name in SAME_NAMES:
        return {SAME_NAMES[name]: tensor}
    if name in ("q_norm.weight", "k_norm.weight"):
        part = name[0]
        places = _places(part, config)
        if spec.qk_norm == "head":
            parts = [tensor] if len(places) == 1 else list(tensor.unbind())
        else:
            parts = _scatter(tensor, part, config, dim=0)
        if spec.qk_norm == "full":
            parts = [one.flatten() for one in parts]
        return {f"{place}{name}": one for place, one in zip(places, parts, strict=True)}
    out: dict[str, Tensor] = {}
    if name in FUSED:
        dim, kind = int(name in OUTPUTS), _kind(name)
        segments = _segments(name, config)
        for (part, size), segment in zip(
            segments, torch.split(tensor, [size for _, size in segments], dim=dim), strict=True
        ):
            if not size:
                continue
            places = _places(part, config)
            for place, one in zip(places, _scatter(segment, part, config, dim=dim), strict=True):
                out[f"{place}{part}_proj.{kind}"] = one
        return out
    if name == "attention_experts.out_bias":
        places = _places("o", config)
        return {f"{place}o_proj.bias": one for place, one in zip(places, tensor, strict=True)}
    if name == "experts.experts_in":
        for place, one in zip(_feed_forward_places(config), tensor, strict=True):
            out[f"{place}gate_proj.weight"], out[f"{place}up_proj.weight"] = one.chunk(2, dim=0)
        return out
    if name == "experts.experts_out":
        places = _feed_forward_places(config)
        return {f"{place}down_proj.weight": one for place, one in zip(places, tensor, strict=True)}
    raise KeyError(name)


def fused_modules(name: str, config: ModelConfig) -> list[tuple[list[str], int]]:
    """Return the stored modules of each projection of a matrix in `FUSED`, with its rows or columns.

    A projection has several modules where each attention expert has its own.
    """
    return [
        ([f"{place}{part}_proj" for place in _places(part, config)], size)
        for part, size in _segments(name, config)
    ]


def _kind(name: str) -> str:
    return "bias" if name.endswith("bias") else "weight"


def _segments(name: str, config: ModelConfig) -> list[tuple[str, int]]:
    """Return the projections of one of our tensors with their sizes; those of size 0 are not stored."""
    q, k, v, gate, up = config.projection_sizes
    sizes = {"q": q, "k": k, "v": v, "gate": gate, "up": up, "o": q, "down": up}
    if name == "down_proj.bias":
        sizes["down"] = config.hidden_size
    return [(part, sizes[part]) for part in FUSED[name]]


def _places(part: str, config: ModelConfig) -> list[str]:
    """Return the prefixes of the stored projections of a part, one, or one per attention expert."""
    if part in ("gate", "up", "down"):
        return ["mlp." if config.mixture is None else "mlp.shared_expert."]
    copies = config.kv_copies if part in "kv" else config.query_copies
    if config.mixture is None or config.mixture.attention == "averaged" or (part in "kv" and copies == 1):
        return ["self_attn."]
    return [f"self_attn.experts.{index}." for index in range(copies)]


def _feed_forward_places(config: ModelConfig) -> list[str]:
    assert config.mixture is not None
    return [f"mlp.experts.{index}." for index in range(len(config.mixture.experts))]


def _interleaved(part: str, config: ModelConfig) -> bool:
    """Return whether the experts' heads are adjacent under each key head that they share."""
    return part in "qo" and config.query_copies > config.kv_copies


def _gather(parts: list[Tensor], part: str, config: ModelConfig, *, dim: int) -> Tensor:
    """Concatenate the heads of all experts along `dim`."""
    if len(parts) == 1:
        return parts[0]
    if not _interleaved(part, config):
        return torch.cat(parts, dim=dim)
    by_key_head = [torch.unflatten(one, dim, (config.kv_heads, -1)) for one in parts]
    return torch.stack(by_key_head, dim=dim + 1).flatten(dim, dim + 2)


def _scatter(tensor: Tensor, part: str, config: ModelConfig, *, dim: int) -> list[Tensor]:
    """Split the heads of all experts; the reverse of `_gather`."""
    copies = len(_places(part, config))
    if copies == 1:
        return [tensor]
    if not _interleaved(part, config):
        return list(tensor.chunk(copies, dim=dim))
    by_key_head = torch.unflatten(tensor, dim, (config.kv_heads, copies, -1))
    return [one.flatten(dim, dim + 1) for one in by_key_head.unbind(dim + 1)]
