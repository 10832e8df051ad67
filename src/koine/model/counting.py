"""Counts that follow from a configuration: parameters, floating-point operations, bytes of cache.

A multiplication with its addition counts as two operations. Only matrix products are counted (projections, attention scores and
their products with the values, the output matrix), which is what the share of the matmul ceiling compares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from koine.model.config import LayerSpec, ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; `total` counts a tied embedding once. Domain embeddings are fixed and not counted."""

    embedding: int
    head: int
    blocks: int
    norm: int
    inactive: int = 0
    """Parameters of the feed-forward experts that a token does not go to."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.blocks + self.norm

    @property
    def active(self) -> int:
        """Parameters that one token meets, the whole embedding counted."""
        return self.total - self.inactive

    @property
    def non_embedding(self) -> int:
        """Parameters of the blocks and the final norm."""
        return self.blocks + self.norm


def block_matrix_parameters(config: ModelConfig) -> int:
    """Entries of one block's matrices that every token is multiplied with; of its experts, so many as a token goes to."""
    into = sum(config.projection_sizes)
    out = config.attention_size + config.dense_size
    matrices = config.hidden_size * (into + out)
    mixture = config.mixture
    if mixture is None:
        return matrices
    matrices += mixture.top_k * expert_parameters(config)
    linear_routers = (mixture.domain_size is None) + (mixture.attention != "averaged")
    # Domain embeddings are projected once, not once a token: what a token costs is its product with the result.
    return matrices + (linear_routers + (mixture.domain_size is not None)) * config.hidden_size * len(
        mixture.experts
    )


def expert_parameters(config: ModelConfig) -> int:
    """Entries of one feed-forward expert."""
    return 3 * config.hidden_size * config.intermediate_size


def _mixture_parameters(config: ModelConfig) -> tuple[int, int]:
    """Of one block: parameters beyond those that `block_matrix_parameters` counts, and those of them in experts a token does not go to."""
    mixture = config.mixture
    if mixture is None:
        return 0, 0
    inactive = (len(mixture.experts) - mixture.top_k) * expert_parameters(config)
    if mixture.domain_size is None:
        return inactive, inactive
    router = 2 * config.hidden_size * mixture.domain_size + config.hidden_size**2
    return inactive + router - config.hidden_size * len(mixture.experts), inactive


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters by part."""
    blocks = 0
    more, inactive = _mixture_parameters(config)
    for spec in config.layers:
        blocks += block_matrix_parameters(config) + more + config.hidden_size
        if spec.qk_norm:
            blocks += config.attention_size + config.kv_size
    embedding = config.vocab_size * config.hidden_size
    return Parameters(
        embedding,
        0 if config.tie_embeddings else embedding,
        blocks,
        config.hidden_size,
        inactive * len(config.layers),
    )


def visible_pairs(time: int, window: int | None) -> int:
    """Pairs (query, key) with the key at or before the query and inside its window, in a sequence of `time`."""
    if window is None or window >= time:
        return time * (time + 1) // 2
    return window * (window + 1) // 2 + (time - window) * window


def forward_flops(config: ModelConfig, time: int) -> int:
    """Operations of one forward pass over a sequence of `time` tokens, with the logits of every position."""
    matrices = len(config.layers) * block_matrix_parameters(config) + config.vocab_size * config.hidden_size
    pairs = sum(visible_pairs(time, spec.window) for spec in config.layers)
    # Each pair costs a product of q and k and one of its weight with v: head_dim multiply-adds each, in every head.
    return 2 * time * matrices + 4 * config.attention_size * pairs


def forward_flops_per_token(config: ModelConfig, time: int) -> float:
    """Forward operations a token, averaged over a sequence of `time`."""
    return forward_flops(config, time) / time


def training_flops_per_token(config: ModelConfig, time: int) -> float:
    """Forward and backward: each product has two more of equal size in the backward pass. Recomputation is not counted."""
    return 3.0 * forward_flops_per_token(config, time)


def cache_bytes_per_token(config: ModelConfig, element_bytes: int = 2) -> int:
    """Bytes that one more token adds while no window is full."""
    return 2 * config.kv_size * element_bytes * len(config.layers)


def page_bytes(config: ModelConfig, positions: int, element_bytes: int) -> int:
    """Bytes of a page of so many positions in all full layers."""
    full = sum(spec.window is None for spec in config.layers)
    return 2 * config.kv_size * element_bytes * full * positions


def cache_bytes(config: ModelConfig, time: int, element_bytes: int = 2) -> int:
    """Bytes of keys and values held after `time` tokens: a windowed layer holds at most its window."""
    held = sum(time if spec.window is None else min(time, spec.window) for spec in config.layers)
    return 2 * config.kv_size * element_bytes * held


def all_full(config: ModelConfig) -> ModelConfig:
    """The twin of a model in which every layer is full."""
    return replace(
        config, layers=tuple(LayerSpec(rope=spec.rope, qk_norm=spec.qk_norm) for spec in config.layers)
    )
