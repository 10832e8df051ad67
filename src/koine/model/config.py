"""What a decoder is made of: its sizes, and one specification a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from koine.errors import UserError, did_you_mean
from koine.model.router_losses import BTX

ATTENTIONS = ("averaged", "kv-experts", "shared-kv")
"""What a mixture does with the attention of its dense models: one average (BTX, Nexus), one expert each with keys and values of its own, or
with shared ones (BAM)."""


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
class MixtureConfig:
    """The experts of every layer. Raises `UserError` where the fields do not fit together."""

    experts: tuple[str, ...]
    """Names of the routed feed-forward experts, and of the attention experts where there are any."""
    top_k: int = 1
    """Feed-forward experts a token goes to."""
    shared_expert: bool = False
    """One more feed-forward expert that every token goes through with weight 1 (Nexus: the seed's)."""
    attention: str = "averaged"
    """See `ATTENTIONS`."""
    attention_top_k: int | None = None
    """Attention experts that keep their gate; `None`: all of them (soft routing)."""
    domain_size: int | None = None
    """Width of the domain embeddings from which the router is projected (Nexus); `None`: a linear router."""
    load_balancing: float = BTX.load_balancing
    """Factor of the load-balancing loss in training."""
    z_loss: float = BTX.z_loss
    """Factor of the router's z-loss in training."""

    def __post_init__(self) -> None:
        count = len(self.experts)
        if not count:
            raise UserError("the mixture has no experts", mend="give at least one name")
        if len(set(self.experts)) < count:
            twice = next(name for name in self.experts if self.experts.count(name) > 1)
            raise UserError(f"two experts are named '{twice}'", mend="give each a name of its own")
        if self.attention not in ATTENTIONS:
            raise UserError(
                f"unknown attention '{self.attention}'", mend=did_you_mean(self.attention, ATTENTIONS)
            )
        if self.attention_top_k is not None and self.attention == "averaged":
            raise UserError(
                "attention_top_k is given and the attention is averaged", mend="there is one attention only"
            )
        for name, value in (("top_k", self.top_k), ("attention_top_k", self.attention_top_k)):
            if value is not None and not 1 <= value <= count:
                raise UserError(f"{name} is {value}", mend=f"it must lie between 1 and the {count} experts")
        if self.domain_size is not None and self.domain_size < 1:
            raise UserError(f"domain_size is {self.domain_size}", mend="it must be at least 1")
        for name in ("load_balancing", "z_loss"):
            if not (getattr(self, name) >= 0.0 and math.isfinite(getattr(self, name))):
                raise UserError(f"{name} is {getattr(self, name)}", mend="it must be a number, 0 or above")


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
    mixture: MixtureConfig | None = None
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
        return self.query_heads // self.kv_heads

    @property
    def query_copies(self) -> int:
        """How often the query heads are there: once, or once an attention expert."""
        mixture = self.mixture
        return 1 if mixture is None or mixture.attention == "averaged" else len(mixture.experts)

    @property
    def kv_copies(self) -> int:
        """How often the key heads are there: attention experts may share them."""
        shared = self.mixture is not None and self.mixture.attention == "shared-kv"
        return 1 if shared else self.query_copies

    @property
    def query_heads(self) -> int:
        """Query heads of a layer, those of all attention experts together."""
        return self.num_heads * self.query_copies

    @property
    def kv_heads(self) -> int:
        """Key heads of a layer, those of all attention experts together."""
        return self.num_kv_heads * self.kv_copies

    @property
    def attention_size(self) -> int:
        """Width of all query heads together."""
        return self.query_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.kv_heads * self.head_dim

    @property
    def dense_size(self) -> int:
        """Width of the feed-forward half that every token goes through; 0 where it has routed experts only."""
        return self.intermediate_size if self.mixture is None or self.mixture.shared_expert else 0

    @property
    def projection_sizes(self) -> tuple[int, int, int, int, int]:
        """Widths of q, k, v, gate and up: the rows of a block's fused input projection, in this order."""
        return (self.attention_size, self.kv_size, self.kv_size, self.dense_size, self.dense_size)
