"""Linear layers for CPU inference, in the weight layout that is fastest there.

Times: docs/explanation/log.md.

| processor and precision | layout |
|---|---|
| Intel, float32 | transposed, for MKL |
| others, float32 | oneDNN's own: MKL, which torch calls in float32, is slow there |
| others, float32, a small matrix and one row | also transposed, in as many parts as there are threads |
| any, bfloat16 | oneDNN's own: torch would pack the weight again at every call |

A prepacked model computes the same sums in another order, and cannot be trained or saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from koine.hardware import is_intel
from koine.model.decoder import Decoder

Operation = Callable[[], object]
"""An operation whose input and output are fixed tensors."""

SMALL = 2**19
"""Elements of a weight up to which it is kept in a second layout for one row.

A call of oneDNN costs some 11 µs before it computes, a batched matmul of MKL 1 µs (docs/explanation/log.md).
"""
SMALLEST_PART = 2**15
"""Fewest elements of a weight for one thread."""


class PrepackedLinear(nn.Module):
    """`x @ weight.T` with a weight `[out, in]` in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        # Not buffers: a packed tensor can be neither copied to another device nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        small = weight.dtype == torch.float32 and weight.numel() <= SMALL
        self._parts = split_by_threads(weight.detach()) if small else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], None)
        return out

    def write(self, x: Tensor, out: Tensor) -> Operation:
        """Return the operation that writes `forward` of `x` `[rows, in]` into `out` `[rows, out]`."""
        if x.shape[0] > 1 or self._parts is None:
            return lambda: out.copy_(self(x))
        x_p1i, out_p1o, bias = self._in_parts(x, out)
        if bias is None:
            return partial(torch.bmm, x_p1i, self._parts, out=out_p1o)
        return partial(torch.baddbmm, bias, x_p1i, self._parts, out=out_p1o)

    def add_to(self, x: Tensor, out: Tensor, scale: float = 1.0) -> Operation:
        """Return the operation that adds `scale` times `forward` of `x` `[rows, in]` to `out` `[rows, out]`."""
        if x.shape[0] > 1 or self._parts is None or self.bias is not None:
            return lambda: out.add_(self(x), alpha=scale)
        x_p1i, out_p1o, _ = self._in_parts(x, out)
        return partial(out_p1o.baddbmm_, x_p1i, self._parts, alpha=scale)

    def _in_parts(self, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return views of one row of the input, of the output and of the bias, for each part of the weight."""
        assert self._parts is not None
        parts = self._parts.shape[0]
        bias = None if self.bias is None else self.bias.view(parts, 1, -1)
        return x.expand(parts, 1, -1), out.view(parts, 1, -1), bias


def split_by_threads(weight: Tensor) -> Tensor:
    """Return the transpose of a weight `[out, in]` in parts of the output, `[parts, in, out / parts]`.

    MKL multiplies one row by a matrix in one thread, and a batch of matrices in several.
    """
    most = max(1, min(torch.get_num_threads(), weight.numel() // SMALLEST_PART))
    parts = next(count for count in range(most, 0, -1) if weight.shape[0] % count == 0)
    return weight.view(parts, -1, weight.shape[1]).transpose(1, 2).contiguous()


class TransposedLinear(nn.Module):
    """`x @ weight.T` with the transpose of a weight `[out, in]` laid out in memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        # Not a buffer, as in PackedLinear: neither is saved.
        self._transposed = weight.detach().t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        flat = x.reshape(-1, self.in_features)
        if self.bias is None:
            rows = torch.mm(flat, self._transposed)
        else:
            rows = torch.addmm(self.bias, flat, self._transposed)
        return rows.view(*x.shape[:-1], self.out_features)

    def write(self, x: Tensor, out: Tensor) -> Operation:
        """Return the operation that writes `forward` of `x` `[rows, in]` into `out` `[rows, out]`."""
        if self.bias is None:
            return partial(torch.mm, x, self._transposed, out=out)
        return partial(torch.addmm, self.bias, x, self._transposed, out=out)

    def add_to(self, x: Tensor, out: Tensor, scale: float = 1.0) -> Operation:
        """Return the operation that adds `scale` times `forward` of `x` `[rows, in]` to `out` `[rows, out]`."""
        if self.bias is not None:
            return lambda: out.add_(self(x), alpha=scale)
        return partial(out.addmm_, x, self._transposed, alpha=scale)


def best_layout(dtype: torch.dtype) -> type[PrepackedLinear] | type[TransposedLinear]:
    """Return the faster of the two on this processor; never another, so that results stay the same."""
    return TransposedLinear if is_intel() and dtype == torch.float32 else PrepackedLinear


def can_prepack(model: Decoder) -> bool:
    """Return whether this build of torch can prepack weights of the model's dtype on its device."""
    weight = model.embedding.weight
    if weight.device.type != "cpu":
        return False
    if best_layout(weight.dtype) is TransposedLinear:
        return True
    if not torch._C._has_mkldnn:
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def prepack(model: Decoder) -> Decoder:
    """Replace the weight matrices of `model` by prepacked ones, in place, one at a time; return the model.

    It is unchanged where they cannot be prepacked. The embedding stays for look-up, so a tied one takes
    memory twice.
    """
    if can_prepack(model):
        layout = best_layout(model.embedding.weight.dtype)
        for block in model.blocks:
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, layout(linear.weight, linear.bias))
        model.packed_head = layout(model.output_weight)
        if not model.config.tie_embeddings:
            del model.head
    return model.requires_grad_(False).eval()
