"""RoPE for decode steps: a table of the rotations of all positions, computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from koine.model.attention.rope import rotation
from koine.model.attention.rope_frequencies import Rope
from koine.model.config import ModelConfig

FIRST = 2048
"""Positions of the first table; a longer text doubles it."""
LONGEST = 2**15
"""Positions of the longest table: 8 MiB with 64 entries a head. Later positions are computed at each step."""


class RopeTable:
    """Rotations of queries (times the scale of the scores) and keys by position, for one `Rope`."""

    def __init__(self, rope: Rope, config: ModelConfig) -> None:
        self._rope = rope
        self._scales = torch.ones(config.query_heads + config.kv_heads, 1)
        self._scales[: config.query_heads] = config.score_scale
        # Dynamic scaling gives a position other frequencies in a longer text.
        self._fixed = rope.scaling is None or rope.scaling.kind != "dynamic"
        self._table = torch.empty(0, rope.head_dim // 2, dtype=torch.complex64)

    def write(self, positions: Tensor, out_nhd: Tensor) -> None:
        """Write the complex factors of `positions` `[batch, time]` into `[rows, heads, head_dim / 2]`."""
        torch.mul(self._factors(positions).unsqueeze(1), self._scales, out=out_nhd)

    def _factors(self, positions: Tensor) -> Tensor:
        if not self._fixed:
            return _factors(positions, self._rope).flatten(0, 1)
        needed = int(positions.max()) + 1
        if needed > LONGEST:
            return _factors(positions, self._rope).flatten(0, 1)
        if needed > len(self._table):
            length = FIRST
            while length < needed:
                length *= 2
            self._table = _factors(torch.arange(length)[None], self._rope)[0]
        return self._table.index_select(0, positions.flatten())


def _factors(positions: Tensor, rope: Rope) -> Tensor:
    cis = rotation(positions, rope).cis
    # Gradients are off: only then is there a complex table.
    assert cis is not None
    return cis
