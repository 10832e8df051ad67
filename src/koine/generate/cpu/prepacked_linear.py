"""Linear layers for CPU inference, in the weight layout that is fastest there.

Times: docs/explanation/log.md.

| processor and precision | layout |
|---|---|
| Intel, float32 | transposed, for MKL |
| others, float32 | oneDNN's own: MKL, which torch calls in float32, is slow there |
| others, float32, one row | also transposed, in parts (`koine.generate.cpu.one_row`) |
| any, bfloat16 | oneDNN's own: torch would pack the weight again at every call |

A prepacked model computes the same sums in another order, and cannot be trained or saved.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from koine.generate.cpu.one_row import OneRowWeight, Operation
from koine.hardware import is_intel
from koine.model.decoder import Decoder

MOST_ELEMENTS = 2**28
"""Elements of all weights together (1 GiB in float32) up to which each is also kept in the layout for one row.

One row is then up to 1.8 times as fast, and the weights take memory twice.
"""


class PrepackedLinear(nn.Module):
    """`x @ weight.T` with a weight `[out, in]` in oneDNN's layout.

    one_row: also keep the weight in the layout for one row (float32).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, one_row: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        # Not buffers: a packed tensor can be neither copied to another device nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._one_row = OneRowWeight(weight.detach().contiguous(), self.bias) if one_row else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        if self._one_row is not None and x.numel() == self.in_features:
            return self._one_row(x.reshape(1, -1)).view(*x.shape[:-1], self.out_features)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], None)
        return out

    def write(self, x: Tensor, out: Tensor) -> list[Operation]:
        """Return the operations that write `forward` of `x` `[rows, in]` into `out` `[rows, out]`."""
        if self._one_row is not None and len(x) == 1:
            return self._one_row.write(x, out)
        return [lambda: out.copy_(self(x))]

    def add_to(self, x: Tensor, out: Tensor, scale: float = 1.0) -> list[Operation]:
        """Return the operations that add `scale` times `forward` of `x` `[rows, in]` to `out` `[rows, out]`."""
        if self._one_row is not None and len(x) == 1:
            return self._one_row.add_to(x, out, scale)
        return [lambda: out.add_(self(x), alpha=scale)]


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

    def write(self, x: Tensor, out: Tensor) -> list[Operation]:
        """Return the operations that write `forward` of `x` `[rows, in]` into `out` `[rows, out]`."""
        if self.bias is None:
            return [partial(torch.mm, x, self._transposed, out=out)]
        return [partial(torch.addmm, self.bias, x, self._transposed, out=out)]

    def add_to(self, x: Tensor, out: Tensor, scale: float = 1.0) -> list[Operation]:
        """Return the operations that add `scale` times `forward` of `x` `[rows, in]` to `out` `[rows, out]`."""
        operations: list[Operation] = [partial(out.addmm_, x, self._transposed, alpha=scale)]
        return operations if self.bias is None else [*operations, partial(out.add_, self.bias, alpha=scale)]


def best_layout(dtype: torch.dtype) -> type[PrepackedLinear] | type[TransposedLinear]:
    """Return the faster of the two on this processor; never another, so that results stay the same."""
    return TransposedLinear if is_intel() and dtype == torch.float32 else PrepackedLinear


def can_prepack(model: Decoder) -> bool:
    """Return whether this build of torch can prepack weights of the model's dtype on its device.

    A model with a LoRA adapter stays as it is: what the adapter adds is in no weight.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu" or model.adapter is not None:
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
    memory twice; with the layout for one row (`MOST_ELEMENTS`), all do.
    """
    if can_prepack(model):
        kind, dtype = best_layout(model.embedding.weight.dtype), model.embedding.weight.dtype
        one_row = kind is PrepackedLinear and dtype == torch.float32 and _elements(model) <= MOST_ELEMENTS
        layout = partial(PrepackedLinear, one_row=True) if one_row else kind
        for block in model.blocks:
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block, name, layout(linear.weight, linear.bias))
        model.packed_head = layout(model.output_weight)
        if not model.config.tie_embeddings:
            del model.head
    return model.requires_grad_(False).eval()


def _elements(model: Decoder) -> int:
    """Return the elements of the matrices that `prepack` packs."""
    blocks = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    return model.output_weight.numel() + sum(weight.numel() for weight in blocks)
