"""Counts from a configuration: parameters, floating-point operations, bytes of KV cache.

A multiplication with its addition counts as two operations. Only matrix products are counted (projections,
attention scores and their products with the values, the output matrix), as in the matmul rate that
training compares with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from koine.model.config import LayerSpec, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; `total` counts a tied embedding once. Fixed domain embeddings are not counted."""

    embedding: int
    head: int
    blocks: int
    norm: int
    inactive: int = 0
    """Parameters of the feed-forward experts that are not active for a token."""

    @property
    def total(self) -> int:
        """Count of all parameters."""
        return self.embedding + self.head + self.blocks + self.norm

    @property
    def active(self) -> int:
        """Parameters active for one token, with the whole embedding."""
        return self.total - self.inactive

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks and the final norm."""
        return self.blocks + self.norm


def block_matrix_parameters(config: ModelConfig) -> int:
    """Count the entries of one block's matrices that are active for a token."""
    into = sum(config.projection_sizes)
    out = config.attention_size + config.dense_size
    matrices = config.hidden_size * (into + out)
    mixture = config.mixture
    if mixture is None:
        return matrices
    matrices += mixture.top_k * expert_parameters(config)
    linear_routers = (mixture.domain_size is None) + (mixture.attention != "averaged")
    matrices += mixture.shared_gate * config.hidden_size
    # Domain embeddings are projected once, not per token; a token costs one product with the result.
    return matrices + (linear_routers + (mixture.domain_size is not None)) * config.hidden_size * len(
        mixture.experts
    )


def block_vector_parameters(config: ModelConfig, spec: LayerSpec) -> int:
    """Count the entries of one block's norms and biases."""
    norms = {"parallel": 1, "pre_norm": 2, "post_norm": 2, "sandwich": 4}[config.arrangement]
    count = norms * norm_parameters(config)
    if spec.qk_norm == "head":
        count += config.head_dim * (config.query_copies + config.kv_copies)
    elif spec.qk_norm is not None:
        count += config.attention_size + config.kv_size
    if config.attention_bias:
        count += config.attention_size + 2 * config.kv_size
    if config.attention_out_bias:
        count += config.hidden_size * config.query_copies
    if config.mlp_bias:
        count += sum(config.projection_sizes[3:]) + config.hidden_size
    return count


def norm_parameters(config: ModelConfig) -> int:
    """Count the entries of one norm of hidden states."""
    return config.hidden_size * (1 + config.norm_bias)


def expert_parameters(config: ModelConfig) -> int:
    """Count the entries of one feed-forward expert."""
    return 3 * config.hidden_size * config.intermediate_size


def _mixture_parameters(config: ModelConfig) -> tuple[int, int]:
    """Count, for one block, the parameters beyond `block_matrix_parameters`, and the inactive ones of them.

    Inactive are the parameters of experts that a token is not routed to.
    """
    mixture = config.mixture
    if mixture is None:
        return 0, 0
    inactive = (len(mixture.experts) - mixture.top_k) * expert_parameters(config)
    if mixture.domain_size is None:
        return inactive, inactive
    router = 2 * config.hidden_size * mixture.domain_size + config.hidden_size**2
    return inactive + router - config.hidden_size * len(mixture.experts), inactive


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters by part."""
    blocks = 0
    more, inactive = _mixture_parameters(config)
    for spec in config.layers:
        blocks += block_matrix_parameters(config) + more + block_vector_parameters(config, spec)
    embedding = config.vocab_size * config.hidden_size
    return Parameters(
        embedding,
        0 if config.tie_embeddings else embedding,
        blocks,
        norm_parameters(config),
        inactive * len(config.layers),
    )


def visible_pairs(time: int, window: int | None) -> int:
    """Count the pairs (query, key) of causal attention with a window, in a sequence of `time`."""
    if window is None or window >= time:
        return time * (time + 1) // 2
    return window * (window + 1) // 2 + (time - window) * window


def forward_flops(config: ModelConfig, time: int) -> int:
    """Count the operations of one forward pass over `time` tokens, with the logits of every position."""
    matrices = len(config.layers) * block_matrix_parameters(config) + config.vocab_size * config.hidden_size
    pairs = sum(visible_pairs(time, spec.window) for spec in config.layers)
    # Each pair costs a product of q and k and one of its weight with v: head_dim multiply-adds each, in every
    # head.
    return 2 * time * matrices + 4 * config.attention_size * pairs


def forward_flops_per_token(config: ModelConfig, time: int) -> float:
    """Compute the forward operations per token, averaged over a sequence of `time`."""
    return forward_flops(config, time) / time


def training_flops_per_token(config: ModelConfig, time: int, *, adapter: int = 0) -> float:
    """Compute the forward and backward operations per token.

    Each product has two of equal size in the backward pass. Recomputation is not counted.

    adapter: parameters of a LoRA adapter. The base then has no gradients: of its products with weights one
        is left in the backward pass, and each product of attention has two as before.
    """
    forward = forward_flops_per_token(config, time)
    if not adapter:
        return 3.0 * forward
    pairs = sum(visible_pairs(time, spec.window) for spec in config.layers)
    attention = 4 * config.attention_size * pairs / time
    return 2.0 * forward + attention + 6.0 * adapter


def cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """Compute the bytes of KV cache that one more token adds while no window is full."""
    return 2 * config.kv_size * element_bytes * len(config.layers)


def page_bytes(config: ModelConfig, positions: int, element_bytes: int) -> int:
    """Compute the bytes of a page of the KV cache, of `positions` in all full layers."""
    full = sum(spec.window is None for spec in config.layers)
    return 2 * config.kv_size * element_bytes * full * positions


def cache_bytes(config: ModelConfig, time: int, element_bytes: int = 2) -> int:
    """Compute the bytes of KV cache after `time` tokens; a windowed layer holds at most its window."""
    held = sum(time if spec.window is None else min(time, spec.window) for spec in config.layers)
    return 2 * config.kv_size * element_bytes * held


def all_full(config: ModelConfig) -> ModelConfig:
    """Return the same configuration with full attention in every layer."""
    return replace(config, layers=tuple(replace(spec, window=None) for spec in config.layers))
