"""Compare two models block by block, so that a failure names the first block that drifts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from koine.model import Decoder


def hidden_states(model: Any, tokens: Tensor, **inputs: Any) -> list[Tensor]:
    """Return the input of the first block and each block's output; of the reference, by hooks."""
    if isinstance(model, Decoder):
        outputs: list[Tensor] = []
        model(tokens, block_outputs=outputs, **inputs)
        return outputs
    outputs = []

    def keep_input(_: Any, arguments: Any, keywords: Any) -> None:
        outputs.append(arguments[0] if arguments else keywords["hidden_states"])

    def keep_output(_: Any, __: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    layers = model.model.layers
    handles = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(keep_output) for layer in layers]
    model(tokens, **inputs)
    for handle in handles:
        handle.remove()
    return outputs


def first_drifting_block(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], *, tolerance: float, where: Tensor | None = None
) -> str | None:
    """`None` where all agree within `tolerance`, else which block differs first and by how much.

    `where` `[batch, time]` says which positions count (padding does not).
    """
    assert len(ours) == len(theirs)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference = (a.float() - b.float()).abs().amax(dim=-1)
        if where is not None:
            difference = difference[where]
        if not torch.isfinite(difference).all() or difference.max() > tolerance:
            place = "the embedding" if index == 0 else f"block {index - 1}"
            return f"{place} drifts by {difference.max():.2e}"
    return None
