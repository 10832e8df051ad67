"""A linear layer with LoRA adapters on parts of its matrix.

Our decoder fuses projections that a class of `transformers` keeps apart. Each of those has an adapter of its
own, so that the fused layer computes what `peft` computes on the separate ones.

Shape suffixes: n tokens, i input, o output, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Part(NamedTuple):
    """A projection of a class inside one of our matrices.

    name: the class's, in its layer, such as `self_attn.q_proj`.
    modules: our stored names of what it holds, one after another.
    sizes: rows of each of them; columns where the matrix joins inputs.
    start: the first row or column.
    """

    name: str
    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        """End of its rows or columns."""
        return self.start + sum(self.sizes)

    @property
    def key(self) -> str:
        """Last part of the name, which is unique in the matrix."""
        return self.name.rpartition(".")[2]


class LoraLinear(nn.Linear):
    """`W x + b`, plus `scale * B A x` in the rows of each part, or of the columns of `x` of each part.

    `weight` and `bias` are those of the layer that it replaces, under the same names, and get no gradients.
    The parts along the rows share one dropout mask, because their A's are one matmul.
    """

    def __init__(
        self,
        base: nn.Linear,
        parts: Sequence[Part],
        *,
        columns: bool,
        rank: int,
        scale: float,
        dropout: float,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.parts, self.columns, self.rank, self.scale = tuple(parts), columns, rank, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for part in self.parts:
            size = part.stop - part.start
            into, out = (size, base.out_features) if columns else (base.in_features, size)
            device = base.weight.device
            self.lora_A[part.key] = nn.Linear(into, rank, bias=False, device=device, dtype=torch.float32)
            self.lora_B[part.key] = nn.Linear(rank, out, bias=False, device=device, dtype=torch.float32)

    @torch.no_grad()
    def reset_adapter(self, generator: torch.Generator) -> None:
        """Initialise A as `peft` does (uniform, as `nn.Linear`), and B with zeros: nothing changes at first."""
        for part in self.parts:
            a_ri, b_or = self._pair(part)
            bound = 1 / math.sqrt(a_ri.shape[1])
            a_ri.copy_(torch.rand(a_ri.shape, generator=generator) * (2 * bound) - bound)
            b_or.zero_()

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer for `[..., in]`."""
        out = F.linear(input, self.weight, self.bias)
        x_ni, out_no = self.dropout(input).flatten(0, -2), out.flatten(0, -2)
        added = self._add_columns(x_ni, out_no) if self.columns else self._add_rows(x_ni, out_no)
        return added.view_as(out)

    def _add_rows(self, x_ni: Tensor, out_no: Tensor) -> Tensor:
        """Add each part to its rows: one matmul with all A's, then one with each B."""
        pairs = [self._pair(part) for part in self.parts]
        down = torch.cat([a for a, _ in pairs]) if len(pairs) > 1 else pairs[0][0]
        hidden = F.linear(x_ni, down.to(x_ni.dtype)).chunk(len(pairs), dim=-1)
        pieces, at = [], 0
        for part, (_, b_or), hidden_nr in zip(self.parts, pairs, hidden, strict=True):
            if part.start > at:
                pieces.append(out_no[:, at : part.start])
            rows = out_no[:, part.start : part.stop]
            pieces.append(torch.addmm(rows, hidden_nr, b_or.t().to(rows.dtype), alpha=self.scale))
            at = part.stop
        if at < out_no.shape[1]:
            pieces.append(out_no[:, at:])
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def _add_columns(self, x_ni: Tensor, out_no: Tensor) -> Tensor:
        """Add what each part makes of its columns of the input: one matmul with all B's."""
        pairs = [self._pair(part) for part in self.parts]
        hidden = [
            F.linear(x_ni[:, part.start : part.stop], a_ri.to(x_ni.dtype))
            for part, (a_ri, _) in zip(self.parts, pairs, strict=True)
        ]
        up = torch.cat([b for _, b in pairs], dim=1)
        return torch.addmm(out_no, torch.cat(hidden, dim=1), up.t().to(out_no.dtype), alpha=self.scale)

    def _pair(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return A `[rank, in]` and B `[out, rank]` of a part."""
        a, b = self.lora_A[part.key].weight, self.lora_B[part.key].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b
