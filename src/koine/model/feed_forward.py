"""The hidden units of a feed-forward network: SwiGLU, GeGLU (arXiv 2002.05202), or plain."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from koine.model.config import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation elementwise."""
    if activation == "silu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def hidden_units(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return `activation(gate) * up`, or `activation(up)` where the gate is empty.

    gate, up: `[..., intermediate]`; the gate is `[..., 0]` in a plain feed-forward.
    """
    if not gate.shape[-1] and up.shape[-1]:
        return activate(up, activation)
    return activate(gate, activation) * up
