"""The configuration of a decoder: its sizes, and one specification per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from koine.errors import UserError
from koine.fields import check_boolean, check_choice, check_integer, check_number, check_text
from koine.model.moe.loss_weights import BTX

Arrangement = Literal["parallel", "pre_norm", "post_norm", "sandwich"]
"""The place of a block's norms, `A` being attention and `F` the feed-forward.

| arrangement | output | class |
|---|---|---|
| `parallel` | `x + A(norm(x)) + F(norm(x))`, one norm | Cohere |
| `pre_norm` | `h + F(norm(h))` with `h = x + A(norm(x))` | Llama |
| `post_norm` | `h + norm(F(h))` with `h = x + norm(A(x))` | OLMo-2 |
| `sandwich` | `h + norm(F(norm(h)))` with `h = x + norm(A(norm(x)))` | Gemma-2, Gemma-3 |
"""
Norm = Literal["layer_norm", "rms_norm"]
"""`layer_norm` subtracts the mean, `rms_norm` does not."""
QKNorm = Literal["head", "heads", "full"]
"""Norm of queries and keys before the rotation.

`head`: of each head, one weight `[head_dim]` for all (Qwen3). `heads`: of each head, a weight for each
(Cohere). `full`: over all heads together (OLMo-2).
"""
Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]
"""Of the feed-forward; `gelu_tanh` is the approximation by tanh."""
RopeScalingKind = Literal["linear", "dynamic", "llama3", "yarn"]
"""See `koine.model.attention.rope`."""

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
    qk_norm: QKNorm | None = None
    """Norm of q and k before the rotation, of the model's kind of norm."""
    rope_theta: float | None = None
    """Base of the rotation without scaling; `None`: base and scaling of the model."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of RoPE are scaled for long contexts; the fields are those of `transformers`."""

    kind: RopeScalingKind
    factor: float
    original_max_position_embeddings: int | None = None
    """Context length before the scaling (`llama3`, `yarn`); `None`: `max_position_embeddings`."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor on cosines and sines (`yarn`); `None`: `0.1 ln(factor) + 1`, or from the two fields below."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the bounds of YaRN's ramp to whole dimensions."""

    def __post_init__(self) -> None:
        check_choice("the kind of RoPE scaling", self.kind, get_args(RopeScalingKind))
        check_number("the factor of the RoPE scaling", self.factor, low=1, high=1e6)
        if self.original_max_position_embeddings is not None:
            check_integer(
                "original_max_position_embeddings",
                self.original_max_position_embeddings,
                low=1,
                high=SIZES["max_position_embeddings"],
            )
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_number(name, getattr(self, name), above=0, high=1e9)
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor "
                f"{self.high_freq_factor:g}",
                hint="frequencies between the two are blended",
            )
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, high=1e6)
        check_boolean("truncate", self.truncate)


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
    normalise_top_k: bool = False
    """Divide the probabilities of a token's experts by their sum (Mixtral)."""
    shared_expert: bool = False
    """Whether there is one more feed-forward expert, for every token with weight 1 (Nexus: the seed's)."""
    shared_size: int | None = None
    """Width of the shared expert; `None`: that of the others."""
    shared_gate: bool = False
    """Weight the shared expert by a sigmoid gate of the token (Qwen2-MoE)."""
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
        for name in ("shared_expert", "shared_gate", "normalise_top_k"):
            check_boolean(name, getattr(self, name))
        if self.shared_size is not None:
            check_integer("shared_size", self.shared_size, low=1, high=SIZES["intermediate_size"])
        if not self.shared_expert and (self.shared_gate or self.shared_size is not None):
            raise UserError(
                "shared_gate or shared_size is given without a shared expert", hint="set shared_expert too"
            )
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
    arrangement: Arrangement = "parallel"
    norm: Norm = "layer_norm"
    norm_unit_offset: bool = False
    """Norms multiply by `1 + weight` (Gemma)."""
    norm_bias: bool = False
    norm_eps: float = 1e-5
    attention_bias: bool = False
    """Biases of the projections to q, k and v."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated: bool = True
    """`activation(gate(x)) * up(x)`, as SwiGLU; `False`: `activation(up(x))`."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Leading entries of a head that are rotated; `None`: all of them."""
    attention_scale: float | None = None
    """Factor on the products of q and k; `None`: `head_dim ** -0.5`."""
    attention_softcap: float | None = None
    """`cap * tanh(scores / cap)` before the softmax (Gemma-2)."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor on what a sublayer adds to the residual stream (Granite)."""
    logit_scale: float = 0.25
    logit_softcap: float | None = None
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    max_position_embeddings: int = 131_072
    pad_token_id: int = 0
    bos_token_id: int = 5
    eos_token_id: int = 7
    model_type: str = field(default="", compare=False)
    """The class of `transformers` that it was read from, and is saved as where that class can hold it.

    Empty: none. See `koine.model.families`.
    """
    carried: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)
    """Further fields of the `config.json` that it was read from, with their JSON: they are written again."""

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
        self._check_computation()
        check_number("initializer_range", self.initializer_range, low=0, high=100)
        check_boolean("tie_embeddings", self.tie_embeddings)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            check_integer(name, getattr(self, name), low=TOKEN_ID[0], high=TOKEN_ID[1])
        for index, layer in enumerate(self.layers):
            if layer.window is not None:
                check_integer(f"the window of layer {index}", layer.window, low=1, high=LONGEST_WINDOW)
            check_boolean(f"rope of layer {index}", layer.rope)
            if layer.qk_norm is not None:
                check_choice(f"qk_norm of layer {index}", layer.qk_norm, get_args(QKNorm))
            if layer.rope_theta is not None:
                check_number(f"rope_theta of layer {index}", layer.rope_theta, low=1, high=1e30)

    def _check_computation(self) -> None:
        """Raise `UserError` for choices and factors out of their range, or that exclude one another."""
        choices = {"arrangement": Arrangement, "norm": Norm, "activation": Activation}
        for name, values in choices.items():
            check_choice(name, getattr(self, name), get_args(values))
        flags = "norm_unit_offset norm_bias attention_bias attention_out_bias mlp_bias gated"
        for name in flags.split():
            check_boolean(name, getattr(self, name))
        for name in ("logit_scale", "embedding_scale", "residual_scale"):
            check_number(name, getattr(self, name), above=0, high=1e6)
        for name in ("attention_scale", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0, high=1e6)
        if self.rotary_dim is not None:
            check_integer("rotary_dim", self.rotary_dim, low=2, high=self.head_dim)
            if self.rotary_dim % 2:
                raise UserError(f"rotary_dim {self.rotary_dim} is odd", hint="RoPE rotates pairs")
        if self.norm_bias and self.norm == "rms_norm":
            raise UserError("norm_bias is given and the norm is rms_norm", hint="only layer_norm has a bias")
        if self.mlp_bias and self.arrangement == "parallel":
            raise UserError(
                "mlp_bias is given and the block is parallel", hint="give biases to sequential blocks only"
            )
        if self.mixture is not None and (self.mlp_bias or not self.gated):
            raise UserError(
                "the feed-forward is plain or has biases, and the model is a mixture",
                hint="experts are gated feed-forward networks without biases",
            )

    @property
    def context_length(self) -> int:
        """Most tokens of one sequence: with `dynamic` scaling, `factor` times the context before the scaling.

        `max_position_embeddings` is that context there, as in `transformers`: frequencies change beyond it.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "dynamic":
            return self.max_position_embeddings
        return int(self.max_position_embeddings * scaling.factor)

    def with_context(self, length: int) -> ModelConfig:
        """Return the configuration for texts of `length` tokens, or an equal one where it is long enough.

        With `dynamic` scaling the factor grows: texts within the context before the scaling keep their angles.
        """
        if length <= self.context_length:
            return self
        scaling = self.rope_scaling
        if scaling is None or scaling.kind != "dynamic":
            return replace(self, max_position_embeddings=length)
        # Not below `length` after rounding down.
        factor = math.nextafter(length / self.max_position_embeddings, math.inf)
        return replace(self, rope_scaling=replace(scaling, factor=factor))

    @property
    def score_scale(self) -> float:
        """Factor on the products of q and k."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

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
        if self.mixture is None:
            return self.intermediate_size
        return (self.mixture.shared_size or self.intermediate_size) if self.mixture.shared_expert else 0

    @property
    def has_out_bias(self) -> bool:
        """Whether the attention's output projection has one bias; attention experts have one each."""
        return self.attention_out_bias and (self.mixture is None or self.mixture.attention == "averaged")

    @property
    def projection_sizes(self) -> tuple[int, int, int, int, int]:
        """Widths of q, k, v, gate and up: the rows of a block's fused input projection, in this order.

        A plain feed-forward has no gate.
        """
        gate = self.dense_size if self.gated else 0
        return (self.attention_size, self.kv_size, self.kv_size, gate, self.dense_size)
