"""The interface between the decoder and a KV cache (`koine.generate.cache`) or shared prompts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class AttentionContext(Protocol):
    """Positions, and attention of a forward pass, such as over the tokens of a KV cache and the new ones."""

    @property
    def positions(self) -> Tensor:
        """Positions for RoPE, `[batch, time]`."""
        ...

    @property
    def lengths(self) -> Tensor:
        """Length, after this pass, of the sequence that each position belongs to, `[batch, time]`."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values where there is a cache, then attend.

        Args:
            layer: index of the layer.
            q: scaled queries `[batch, time, kv_heads, groups, head_dim]`.
            k, v: `[batch, time, kv_heads, head_dim]`.

        Returns:
            `[batch, time, heads * head_dim]`.
        """
        ...

    def finish(self) -> None:
        """Add the tokens of this pass to the lengths of their sequences."""
        ...


class PackedAttentionContext(AttentionContext, Protocol):
    """A KV cache for passes whose tokens are packed into one row (`koine.generate.cpu`)."""

    def attend_packed(self, layer: int, q: Tensor, new: Tensor) -> Tensor:
        """Store keys and values, then attend, for the tokens of all sequences packed into one row.

        Args:
            layer: index of the layer.
            q: scaled queries `[tokens, kv_heads, groups, head_dim]`.
            new: keys and values `[2, tokens, kv_heads, head_dim]`.

        Returns:
            `[tokens, kv_heads, groups, head_dim]`.
        """
        ...
