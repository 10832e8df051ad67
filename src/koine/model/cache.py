"""Keys and values of the positions already read: a window's worth for windowed layers, all of them for full ones."""

from __future__ import annotations

import torch
from torch import Tensor

from koine.model.config import LayerSpec, ModelConfig


class LayerCache:
    """Keys and values of one layer, `[batch, kv_heads, positions, head_dim]`, oldest first.

    A windowed layer keeps the last `window - 1` positions (a new query sees itself and those); a full one grows, doubling its
    room, so that a step costs no copy of what is there.
    """

    def __init__(
        self, spec: LayerSpec, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keep = None if spec.window is None else spec.window - 1
        shape = (batch, config.num_kv_heads, 0, config.head_dim)
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._start = 0
        self._end = 0

    @property
    def positions(self) -> int:
        """How many positions are held."""
        return self._end - self._start

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[batch, kv_heads, time, head_dim]`; returns the keys and values that the new queries may need.

        For a windowed layer these are the kept ones and the new ones; afterwards only the last `window - 1` stay.
        """
        new = k.shape[2]
        if self._end + new > self._k.shape[2]:
            self._make_room(new)
        self._k[:, :, self._end : self._end + new] = k
        self._v[:, :, self._end : self._end + new] = v
        self._end += new
        visible = self._k[:, :, self._start : self._end], self._v[:, :, self._start : self._end]
        if self.keep is not None:
            self._start = max(self._start, self._end - self.keep)
        return visible

    def _make_room(self, new: int) -> None:
        held = self.positions
        if self.keep is None:
            room = max(2 * held, held + new, 64)
        else:
            # One window of slack, so that positions are moved once a window and not at every step.
            room = held + max(new, self.keep, 1)
        for name in ("_k", "_v"):
            old: Tensor = getattr(self, name)
            grown = old.new_empty((*old.shape[:2], room, old.shape[3]))
            grown[:, :, :held] = old[:, :, self._start : self._end]
            setattr(self, name, grown)
        self._start, self._end = 0, held

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self._k, self._v = self._k[rows], self._v[rows]

    def bytes(self) -> int:
        """Bytes of the keys and values held (what the formula of `koine.model.flops.cache_bytes` counts)."""
        batch, heads, _, width = self._k.shape
        return 2 * batch * heads * self.positions * width * self._k.element_size()


class Cache:
    """One `LayerCache` a layer, and how many positions each row of the batch has been given."""

    def __init__(self, config: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layers = [LayerCache(spec, config, batch, dtype, device) for spec in config.layers]
        self.length = 0
        self.padding = torch.zeros(batch, dtype=torch.long, device=device)
        """`[batch]`: positions of left padding in each row."""

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (their answers go on; the others' are finished)."""
        self.padding = self.padding[rows]
        for layer in self.layers:
            layer.select(rows)

    def bytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(layer.bytes() for layer in self.layers)
