"""Product of one row and a matrix in float32, on processors where oneDNN is slow at it.

MKL multiplies one row by a matrix in one thread, and a batch of matrices in several. So the transpose of the
weight is stored in as many parts as there are threads: parts of the output, or, for matrices that do not stay
in the processor's caches, of the input, whose rows are longer and stream faster (docs/explanation/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Operation = Callable[[], object]
"""An operation whose input and output are fixed tensors."""

SMALL = 2**18
"""Elements of a weight up to which it is split by its outputs."""
SMALLEST_PART = 2**15
"""Fewest elements of a weight for one thread."""


class OneRowWeight:
    """A weight `[out, in]` for `[1, in]` inputs, with a bias or none."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._by_output = weight.numel() <= SMALL or torch.get_num_threads() == 1
        split, other = weight.shape if self._by_output else weight.shape[::-1]
        parts = _parts(split, weight.numel())
        if self._by_output:
            weight_poi = weight.view(parts, split // parts, other)
        else:
            weight_poi = weight.view(other, parts, split // parts).transpose(0, 1)
        self._weight_pio = weight_poi.transpose(1, 2).contiguous()
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias` of one row `[1, in]`."""
        parts, _, outputs = self._weight_pio.shape
        out = torch.empty(1, parts * outputs if self._by_output else outputs)
        for operation in self.write(x, out):
            operation()
        return out

    def write(self, x: Tensor, out: Tensor) -> list[Operation]:
        """Return the operations that write `x @ weight.T + bias` into `out` `[1, out]`."""
        x_p1i, out_p1o = self._in_parts(x, out)
        if not self._by_output:
            operations: list[Operation] = [partial(torch.bmm, x_p1i, self._weight_pio, out=out_p1o)]
            operations.append(partial(torch.sum, out_p1o, dim=0, out=out))
            return operations if self._bias is None else [*operations, partial(out.add_, self._bias)]
        if self._bias is None:
            return [partial(torch.bmm, x_p1i, self._weight_pio, out=out_p1o)]
        bias_p1o = self._bias.view(len(self._weight_pio), 1, -1)
        return [partial(torch.baddbmm, bias_p1o, x_p1i, self._weight_pio, out=out_p1o)]

    def add_to(self, x: Tensor, out: Tensor, scale: float) -> list[Operation]:
        """Return the operations that add `scale` times `x @ weight.T + bias` to `out`."""
        x_p1i, out_p1o = self._in_parts(x, out)
        operations: list[Operation]
        if self._by_output:
            operations = [partial(out_p1o.baddbmm_, x_p1i, self._weight_pio, alpha=scale)]
        else:
            operations = [partial(torch.bmm, x_p1i, self._weight_pio, out=out_p1o)]
            operations += [partial(out.add_, part, alpha=scale) for part in out_p1o]
        return operations if self._bias is None else [*operations, partial(out.add_, self._bias, alpha=scale)]

    def _in_parts(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input `[parts, 1, in]`, and where each part's output is written, `[parts, 1, out]`."""
        parts, size, outputs = self._weight_pio.shape
        if self._by_output:
            return x.expand(parts, 1, size), out.view(parts, 1, outputs)
        return x.view(parts, 1, size), torch.empty(parts, 1, outputs)


def _parts(size: int, elements: int) -> int:
    """Return how many parts a weight is split into: at most the number of threads, and a divisor of `size`."""
    most = max(1, min(torch.get_num_threads(), elements // SMALLEST_PART))
    return next(count for count in range(most, 0, -1) if size % count == 0)
