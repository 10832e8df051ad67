"""What a decoder is made of: its sizes, and one specification a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from koine.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: how far it looks back and how it knows positions."""

    window: int | None = None
    """A position sees itself and the `window - 1` before it; `None`: all before it."""
    rope: bool = True
    """Rotate queries and keys by their position; `False`: no position encoding (NoPE)."""
    qk_norm: bool = False
    """LayerNorm on each head of q and k before the rotation."""


def hybrid_layers(count: int, *, window: int, full_every: int = 4) -> tuple[LayerSpec, ...]:
    """The Cohere2 pattern: sliding-window layers with RoPE, every `full_every`-th layer full without positions."""
    return tuple(
        LayerSpec(rope=False) if (index + 1) % full_every == 0 else LayerSpec(window=window)
        for index in range(count)
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a decoder. Raises `UserError` where they do not fit together."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    logit_scale: float = 0.25
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    bos_token_id: int = 5
    eos_token_id: int = 7

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", mend="it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
                mend="each key head serves the same number of query heads",
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd", mend="the rotary embedding turns pairs")
        if not self.layers:
            raise UserError("the model has no layers", mend="give at least one layer specification")
        if not (self.rope_theta > 0.0 and math.isfinite(self.rope_theta)):
            raise UserError(f"rope_theta is {self.rope_theta}", mend="it must be a number above 0")
        for index, layer in enumerate(self.layers):
            if layer.window is not None and layer.window < 1:
                raise UserError(f"layer {index} has a window of {layer.window}", mend="it must be at least 1")

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def attention_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.num_kv_heads * self.head_dim

    @property
    def projection_sizes(self) -> tuple[int, int, int, int, int]:
        """Widths of q, k, v, gate and up: the rows of a block's fused input projection, in this order."""
        return (
            self.attention_size,
            self.kv_size,
            self.kv_size,
            self.intermediate_size,
            self.intermediate_size,
        )
