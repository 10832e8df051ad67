"""The configuration of a decoder: its sizes, and one specification per layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from koine.errors import UserError
from koine.fields import check_boolean, check_choice, check_integer, check_number, check_text
from koine.model.moe.loss_weights import BTX

ATTENTIONS = ("averaged", "kv-experts", "shared-kv")
"""The attention of a mixture: one average of the dense models' (BTX, Nexus), or one expert each (BAM).

Attention experts have keys and values of their own (`kv-experts`) or shared ones (`shared-kv`).
"""

SIZES: Mapping[str, int] = {
    "vocab_size": 2**28,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_heads": 2**14,
    "num_kv_heads": 2**14,
    "head_dim": 2**14,
    "max_position_embeddings": 2**48,
}
"""The largest value of each size; the smallest is 1.

Far above any model, and below what overflows an index.
"""
MOST_LAYERS = 1024
LONGEST_WINDOW = 2**48
TOKEN_ID = (-1, 2**31 - 1)
"""Smallest and largest token id of a configuration; some models write -1 for none."""


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer: its attention window and its position encoding."""

    window: int | None = None
    """A position sees itself and the `window - 1` before it; `None`: all before it."""
    rope: bool = True
    """Rotate queries and keys by their position; `False`: no position encoding (NoPE)."""
    qk_norm: bool = False
    """LayerNorm on each head of q and k before the rotation."""


def hybrid_layers(count: int, *, window: int, full_every: int = 4) -> tuple[LayerSpec, ...]:
    """Return Cohere2's pattern: windowed layers with RoPE, every `full_every`-th full without positions."""
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
    """Feed-forward experts per token."""
    shared_expert: bool = False
    """Whether there is one more feed-forward expert, for every token with weight 1 (Nexus: the seed's)."""
    attention: str = "averaged"
    """See `ATTENTIONS`."""
    attention_top_k: int | None = None
    """Attention experts per token; `None`: all of them (soft routing)."""
    domain_size: int | None = None
    """Width of the domain embeddings from which the router is projected (Nexus); `None`: a linear router."""
    load_balancing: float = BTX.load_balancing
    """Factor of the load-balancing loss in training."""
    z_loss: float = BTX.z_loss
    """Factor of the router's z-loss in training."""

    def __post_init__(self) -> None:
        count = len(self.experts)
        if not count:
            raise UserError("the mixture has no experts", hint="give at least one name")
        if len(set(self.experts)) < count:
            twice = next(name for name in self.experts if self.experts.count(name) > 1)
            raise UserError(f"two experts are named '{twice}'", hint="give each a name of its own")
        for name in self.experts:
            check_text("the name of an expert", name)
        check_choice("attention", self.attention, ATTENTIONS)
        check_boolean("shared_expert", self.shared_expert)
        if self.attention_top_k is not None and self.attention == "averaged":
            raise UserError(
                "attention_top_k is given and the attention is averaged", hint="there is one attention only"
            )
        for name, value in (("top_k", self.top_k), ("attention_top_k", self.attention_top_k)):
            if value is not None and not 1 <= check_integer(name, value) <= count:
                raise UserError(f"{name} is {value}", hint=f"it must lie between 1 and the {count} experts")
        if self.domain_size is not None:
            check_integer("domain_size", self.domain_size, low=1, high=2**20)
        for name in ("load_balancing", "z_loss"):
            check_number(name, getattr(self, name), low=0, high=1e6)


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
        for name, high in SIZES.items():
            check_integer(name, getattr(self, name), low=1, high=high)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
                hint="each key head serves the same number of query heads",
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd", hint="RoPE rotates pairs")
        if not self.layers:
            raise UserError("the model has no layers", hint="give at least one layer specification")
        if len(self.layers) > MOST_LAYERS:
            raise UserError(
                f"the model has {len(self.layers)} layers", hint=f"at most {MOST_LAYERS} are possible"
            )
        # Below 1, high frequencies leave the range of float32, and above it low ones do.
        check_number("rope_theta", self.rope_theta, low=1, high=1e30)
        check_number("norm_eps", self.norm_eps, above=0, high=1)
        check_number("logit_scale", self.logit_scale, above=0, high=1e6)
        check_number("initializer_range", self.initializer_range, low=0, high=100)
        check_boolean("tie_embeddings", self.tie_embeddings)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            check_integer(name, getattr(self, name), low=TOKEN_ID[0], high=TOKEN_ID[1])
        for index, layer in enumerate(self.layers):
            if layer.window is not None:
                check_integer(f"the window of layer {index}", layer.window, low=1, high=LONGEST_WINDOW)
            check_boolean(f"rope of layer {index}", layer.rope)
            check_boolean(f"qk_norm of layer {index}", layer.qk_norm)

    @property
    def groups(self) -> int:
        """Query heads that share one key head."""
        return self.query_heads // self.kv_heads

    @property
    def query_copies(self) -> int:
        """Copies of the query heads: one, or one per attention expert."""
        mixture = self.mixture
        return 1 if mixture is None or mixture.attention == "averaged" else len(mixture.experts)

    @property
    def kv_copies(self) -> int:
        """Copies of the key heads: one where attention experts share them."""
        shared = self.mixture is not None and self.mixture.attention == "shared-kv"
        return 1 if shared else self.query_copies

    @property
    def query_heads(self) -> int:
        """Query heads of a layer, of all attention experts together."""
        return self.num_heads * self.query_copies

    @property
    def kv_heads(self) -> int:
        """Key heads of a layer, of all attention experts together."""
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
        """Width of the feed-forward layer of every token; 0 with routed experts only."""
        return self.intermediate_size if self.mixture is None or self.mixture.shared_expert else 0

    @property
    def projection_sizes(self) -> tuple[int, int, int, int, int]:
        """Widths of q, k, v, gate and up: the rows of a block's fused input projection, in this order."""
        return (self.attention_size, self.kv_size, self.kv_size, self.dense_size, self.dense_size)
