"""Cross-entropy over a large vocabulary with only a few rows of logits alive at any time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = 16 * 2**20
"""Size of the float32 logits that are alive at once: larger is no faster, smaller has narrow matmuls."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    # The loss is a sum, so its gradients are known up to one factor as soon as the logits are: they are computed in the forward
    # pass, chunk by chunk, and the logits are never needed again.
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        scale: float,
        chunk: int,
        with_gradients: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        kept = targets != IGNORE
        rows = None if bool(kept.all()) else kept.nonzero().squeeze(1)
        used, wanted = (hidden, targets) if rows is None else (hidden[rows], targets[rows])
        grad_used = torch.empty_like(used) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        for start in range(0, len(used), chunk):
            part, target = used[start : start + chunk], wanted[start : start + chunk]
            # Rows are scaled before the product and gradients after it: one pass less over the logits, which are far wider.
            logits = torch.mm(part if scale == 1.0 else part * scale, weight.t())
            probabilities = torch.softmax(logits, dim=-1, dtype=wide)
            # The largest probability is 1 / sum exp(logit - largest): with it the logarithm of the sum needs no second
            # exponential over the vocabulary, and no probability that is taken a logarithm of can be 0.
            log_sum = logits.amax(dim=-1).to(wide) - probabilities.amax(dim=-1).log()
            target = target[:, None]
            loss += (log_sum - logits.gather(1, target).squeeze(1).to(wide)).sum()
            if grad_used is None or grad_weight is None:
                continue
            # Before the cast: in bfloat16 a probability of 0.999 is 1, and the target's gradient would vanish.
            gradient = probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            grad_logits = gradient.to(part.dtype)
            torch.mm(grad_logits, weight, out=grad_used[start : start + len(part)])
            grad_weight += torch.mm(grad_logits.t(), part)
        if grad_used is not None and grad_weight is not None:
            grad_hidden = grad_used.mul_(scale)
            if rows is not None:
                grad_hidden = torch.zeros_like(hidden).index_copy_(0, rows, grad_used)
            ctx.save_for_backward(grad_hidden, grad_weight.mul_(scale).to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grad.to(grad_hidden.dtype)
        return grad_hidden * factor, grad_weight * factor, None, None, None, None


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, scale: float = 1.0, chunk: int | None = None
) -> Tensor:
    """SUM of `-log softmax(scale * hidden @ weight.T)[target]` over the targets that are not -100.

    Args:
        hidden: `[..., hidden]`; matmuls run in its dtype, everything between them in float32 (float64 stays).
        weight: `[vocab, hidden]`.
        targets: `[...]` int64; -100 has no loss and costs no matmul.
        scale: factor on the logits.
        chunk: rows of logits alive at once; by default as many as `CHUNK_BYTES` hold.

    Returns:
        A scalar, float32 (float64 for float64).
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if chunk is None:
        chunk = max(64, CHUNK_BYTES // (4 * weight.shape[0]))
    with_gradients = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    result = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        flat, weight.to(flat.dtype), targets.reshape(-1), scale, chunk, with_gradients
    )
    assert isinstance(result, Tensor)
    return result
