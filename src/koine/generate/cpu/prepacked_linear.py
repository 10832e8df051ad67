"""Linear layers for CPU inference, in the weight layout that is fastest there.

Times: docs/explanation/log.md.

| processor and precision | layout |
|---|---|
| Intel, float32 | transposed, for MKL |
| others, float32 | oneDNN's own: MKL, which torch calls in float32, is slow there |
| any, bfloat16 | oneDNN's own: torch would pack the weight again at every call |

A prepacked model computes the same sums in another order, and cannot be trained or saved.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from koine.hardware import is_intel
from koine.model.decoder import Decoder


class PrepackedLinear(nn.Module):
    """`x @ weight.T` with a weight `[out, in]` in oneDNN's layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        # Not a buffer: a packed tensor can be neither copied to another device nor saved.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], None)
        return out

    def write(self, x: Tensor, out: Tensor) -> None:
        """Write `forward` of `[rows, in]` into `out` `[rows, out]`."""
        out.copy_(self(x))

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """Add `forward` of `[rows, in]` to `out` `[rows, out]`."""
        out.add_(self(x))


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

    def write(self, x: Tensor, out: Tensor) -> None:
        """Write `forward` of `[rows, in]` into `out` `[rows, out]`."""
        if self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)

    def add_to(self, x: Tensor, out: Tensor) -> None:
        """Add `forward` of `[rows, in]` to `out` `[rows, out]`."""
        out.addmm_(x, self._transposed)
        if self.bias is not None:
            out.add_(self.bias)


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
